"""Plant the mistakes that learners make, one at a time, in a copy of the collection: does a test fail?

    python tests/planted_mistakes.py            (about 15 minutes; prints a row for each mistake)
    python tests/planted_mistakes.py guide      the same with mistakes in the guide, the README

Not collected by pytest. A mistake is a text to find and a text to put there, in every script that has it.
"""
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

MISTAKES = [
    ("scores not divided by sqrt(K)", "keys.transpose(-2, -1) / math.sqrt(self.head_dim)", "keys.transpose(-2, -1)"),
    ("scores divided by sqrt(D), not sqrt(K)", "/ math.sqrt(self.head_dim)", "/ math.sqrt(x.size(-1))"),
    ("fused kernel scaled once more", "F.scaled_dot_product_attention(queries,",
     "F.scaled_dot_product_attention(queries / math.sqrt(self.head_dim),"),
    ("padding mask on queries", "return (tokens != PAD)[:, None, None, :]", "return (tokens != PAD)[:, None, :, None]"),
    ("mask the other way round", "scores.masked_fill(~mask, -math.inf)", "scores.masked_fill(mask, -math.inf)"),
    ("empty rows become NaN", "weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0.0)", "weights = weights"),
    ("weights returned after dropout", "context = F.dropout(weights, self.dropout, self.training) @ values",
     "weights = F.dropout(weights, self.dropout, self.training); context = weights @ values"),
    ("softmax over queries", "torch.softmax(scores, dim=-1)", "torch.softmax(scores, dim=-2)"),
    ("heads cut with view alone", "heads = x.view(x.size(0), x.size(1), self.num_heads, self.head_dim)",
     "return x.reshape(x.size(0), self.num_heads, x.size(1), self.head_dim); heads = x"),
    ("heads joined without swapping back", "context.transpose(1, 2).reshape(x.shape)", "context.reshape(x.shape)"),
    ("residual from the normed input", "x = x + self.dropout(attended)", "x = normed + self.dropout(attended)"),
    ("second residual forgotten", "x = x + self.dropout(self.feed_forward(self.norm2(x)))",
     "x = self.dropout(self.feed_forward(self.norm2(x)))"),
    ("<EOS> after the padding", 'labels = pad_rows([target + [EOS] for target in targets], IGNORE_INDEX)',
     'labels = torch.cat([pad_rows(targets, IGNORE_INDEX), torch.full((len(targets), 1), EOS)], 1)'),
    ("label shifted twice", "return F.cross_entropy(logits.flatten(0, 1), labels.flatten(),",
     "return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(),"),
    ("label not shifted", "decoder_input = pad_rows([[SOS] + target for target in targets], PAD)",
     "decoder_input = pad_rows([target + [EOS] for target in targets], PAD)"),
    ("padding counts in the loss", "[IGNORE_INDEX] * len(s) + t + [EOS] for s, t in zip(sources, targets)],\n"
     "                           IGNORE_INDEX)", "[IGNORE_INDEX] * len(s) + t + [EOS] for s, t in zip(sources, targets)],\n"
     "                           PAD)"),
    ("digits count in the loss", "[IGNORE_INDEX] * len(s) + t + [EOS]", "s[1:] + [SEP] + t + [EOS]"),
    ("causal mask hides the present", ".tril(keys - queries)", ".tril(keys - queries - 1)"),
    ("causal mask ignores the cache", ".tril(keys - queries)", ".tril()"),
    ("causal mask shows one future token", ".tril(keys - queries)", ".tril(keys - queries + 1)"),
    ("cache with positions that start over", "torch.arange(past, past + new, device=decoder_input.device)",
     "torch.arange(new, device=decoder_input.device)"),
    ("cached token at the wrong position", "positions[:, start:end], caches)", "positions[:, start:end] * 0, caches)"),
    ("cache overwrites its last entry", "self.keys[:, :, self.length:end] = keys",
     "self.keys[:, :, max(0, self.length - 1):max(0, self.length - 1) + keys.size(2)] = keys"),
    ("left padding counted as positions", "(real.cumsum(1) - 1).clamp(min=0)",
     "torch.arange(total, device=device).expand_as(real)"),
    ("left padding not masked", "mask = None if real.all() else real[:, None, None, :]", "mask = None"),
    ("cross-attention without padding mask in writing",
     "hidden, _ = self.decode(tokens[:, start:end], memory_kv, source_mask, caches=caches)",
     "hidden, _ = self.decode(tokens[:, start:end], memory_kv, None, caches=caches)"),
    ("cross-attention reads the target", "self.cross_attention(self.norm_cross(x), memory_keys, memory_values,",
     "self.cross_attention(self.norm_cross(x), *self.cross_attention.keys_values(x),"),
    ("rows not cut at their <EOS>", "row[:row.index(stop_at) + 1] if stop_at in row else row", "row"),
    ("writing stops when the first row has", "if finished.all():", "if finished.any():"),
    ("top-p drops the token that crosses p", "before < top_p", "before + probabilities <= top_p"),
    ("top-k keeps all that are level", "torch.zeros_like(logits, dtype=torch.bool).scatter(-1, best, True)",
     "logits >= logits.gather(-1, best[:, -1:])"),
    ("penalty rewards negative logits", "torch.where(scores > 0, scores / repetition_penalty, scores * repetition_penalty)",
     "scores / repetition_penalty"),
    ("beams: cache not reordered", "cache.keys[:, :, :length] = cache.keys[rows, :, :length]", "pass"),
    ("beams: all start alive", "live[:, 0] = 0.0", "live[:] = 0.0"),
    ("beams: length without <EOS>", "Hypothesis(total / length ** length_penalty",
     "Hypothesis(total / max(1, length - 1) ** length_penalty"),
    ("beams: stop at the first answer", "(hope <= to_beat).all(1, keepdim=True)", "(to_beat > -math.inf)"),
    ("beams: finished ones live on", "live = kept.masked_fill(ends, -math.inf)", "live = kept"),
    ("beams: wrong parent", "index // self.vocab_size", "index % width"),
    ("MLM: two draws instead of one", "swap = selected & (action >= MASK_SHARE) & (action < MASK_SHARE + RANDOM_SHARE)",
     "swap = selected & (rand(batch, length) < RANDOM_SHARE)"),
    ("MLM: special tokens as replacements", "torch.randint(FIRST_ORDINARY, len(VOCABULARY)",
     "torch.randint(0, len(VOCABULARY)"),
    ("MLM: loss on all positions", "labels = tokens.masked_fill(~selected, IGNORE_INDEX)", "labels = tokens.clone()"),
    ("MLM: rate fixed at 15 %", "rate = MIN_MASKING_RATE + (1 - MIN_MASKING_RATE) * rand(batch, 1)",
     "rate = torch.full((batch, 1), 0.15)"),
    ("mean pooling over padding", "pooled = (hidden * real).sum(1) / real.sum(1)", "pooled = hidden.mean(1)"),
    ("embeddings not tied", "self.output.weight = self.embedding.weight", "pass"),
    ("embeddings start with std 1", "nn.init.normal_(self.embedding.weight, std=0.02)", "pass"),
    ("sine and cosine exchanged", "table[:, 0::2] = torch.sin", "table[:, 0::2] = torch.cos"),
    ("mean of means in evaluate", "correct / counted", "correct / len(loader)"),
    ("gradients never zeroed", "optimizer.zero_grad()  # gradients add up", "pass  # gradients add up"),
    ("rate never warms up", "return (step + 1) / WARMUP_STEPS", "return step / WARMUP_STEPS"),
    ("validation sequences also trained on", "training += indices[held_out:]", "training += indices"),
]
FAST_TESTS = ["test_blocks.py", "test_models.py", "test_generation.py", "test_training.py", "test_dataset.py"]

MISTAKES_IN_THE_GUIDE = [
    ("dead anchor", "(#86-keyvalue-cache)", "(#86-key-value-cache)"),
    ("live but wrong anchor", "[8.6](#86-keyvalue-cache)", "[8.6](#85-repetition-penalty)"),
    ("dead file link", "[`tests/test_alike.py`](tests/test_alike.py)", "[`tests/test_alike.py`](tests/test_alikes.py)"),
    ("unknown method", "`MultiHeadAttention.split_heads`", "`MultiHeadAttention.cut_heads`"),
    ("name in the wrong file", "`warmup_cosine` and `create_optimizer` in [`train_all.py`]",
     "`lr_factor` and `create_optimizer` in [`train_all.py`]"),
    ("test that does not exist", "`test_an_epoch_is_the_plainest_loop_there_is`",
     "`test_an_epoch_is_the_plainest_loop`"),
    ("wrong default", "| heads (`NUM_HEADS`) | 4 |", "| heads (`NUM_HEADS`) | 8 |"),
    ("wrong betas", "| betas | 0.9, 0.999 |", "| betas | 0.9, 0.95 |"),
    ("wrong epochs", "6 to 8 epochs of 85 steps", "6 to 8 epochs of 58 steps"),
    ("wrong sizes", "101,760 to 235,392", "101,786 to 235,392"),
    ("wrong output of a snippet", "std of q.k   2.0", "std of q.k   2.2"),
    ("wrong entropy", "entropy by layer: [0.7, 0.0]", "entropy by layer: [0.5, 0.0]"),
    ("snippet that fails", "from encoder_only import PositionalEncoding\n\ntable",
     "from encoder_only import PositionEncoding\n\ntable"),
    ("wrong figure in a measured table", "| decoder-only | 101,760 | 3.1 | 6 |",
     "| decoder-only | 101,760 | 3.1 | 5 |"),
    ("time wrong by a hundred", "| encoder-only | 101,786 | 3.1 | 1 |", "| encoder-only | 101,786 | 310.0 | 1 |"),
    ("tolerance that holds nothing", "exact match, % (±1) |\n|---|---|---|---|---|\n| encoder-only | 101",
     "exact match, % (±90) |\n|---|---|---|---|---|\n| encoder-only | 101"),
    ("line of output invented", "to stop.\n```\n\nSecond", "to stop.\nAll is well.\n```\n\nSecond"),
    ("percentage in the text", "still reaches 86 %\nwithout", "still reaches 36 %\nwithout"),
    ("number of sequences", "111,110 sequences", "99,999 sequences"),
    ("number of mistakes", "plants fifty mistakes", "plants ninety mistakes"),
    ("table without a source", "Sources: the papers named in the cells;", "The papers named in the cells;"),
    ("percentage without a source", "**What just happened.**",
     "Nine in ten readers, 90 %, like it.\n\n**What just happened.**"),
    ("uncited paper", "(Sennrich et al. 2016)", "(Sennrich et al. 2017)"),
    ("paper of another time", "Kaplan et al. 2020, [Scaling", "Kaplan et al. 2024, [Scaling"),
    ("minutes that do not add up", "| read its output next to section 8 | `python compare_architectures.py` | 15 |",
     "| read its output next to section 8 | `python compare_architectures.py` | 25 |"),
    ("lines of a file", "| 919 | 35 |", "| 719 | 25 |"),
    ("command that does not exist", "`python visualizations.py` | twenty", "`python visualisations.py` | twenty"),
    ("pytest -k that selects nothing", "-k never_nan", "-k never_nans"),
    ("figure that is missing", "(figures/masks.png)", "(figures/mask.png)"),
    ("a question left out", "<b>7. What do attention", "<b>8. What do attention"),
    ("constant that does not exist", "`PROFILE_STEPS = 5`", "`PROFILING_STEPS = 5`"),
]
# In this order: what needs no script to be run, then what needs quick_start.py alone.
GUIDE_TESTS = ["not run_of and not turned and not short_command and not finds_its_place", "run_of_quick_start or run_of_toy"]


def plant(old, new, paths):
    """Replace `old` by `new` in every one of `paths` that has it; how many there were."""
    planted = 0
    for path in paths:
        text = path.read_text(encoding="utf-8")
        if old in text:
            path.write_text(text.replace(old, new), encoding="utf-8")
            planted += 1
    return planted


def first_failure(folder, *arguments):
    """The first test that fails in `folder` with these arguments of pytest, or None."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments], cwd=folder,
                          capture_output=True, text=True)
    found = re.search(r"^(?:FAILED|ERROR) \S*?(test_\w+\.py(?:::\w+)?)", done.stdout, flags=re.MULTILINE)
    return found and found[1]


def main():
    guide = sys.argv[1:] == ["guide"]
    mistakes, missed = MISTAKES_IN_THE_GUIDE if guide else MISTAKES, 0
    for name, old, new in mistakes:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "collection"
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "checkpoints", "__pycache__", ".*cache"))
            planted = plant(old, new, [copy / "README.md"] if guide else copy.glob("*.py"))
            if not planted:
                print(f"{'NOT FOUND':9s} {name}: the text to replace is nowhere", flush=True)
                missed += 1
                continue
            if guide:
                found = first_failure(copy, "tests/test_readme.py", "-k", GUIDE_TESTS[0]) \
                    or first_failure(copy, "tests/test_readme.py", "-k", GUIDE_TESTS[1])
            else:
                found = first_failure(copy, *(f"tests/{test}" for test in FAST_TESTS))
            missed += found is None
            print(f"{'caught' if found else 'MISSED':9s} {name:48s} in {planted}   {found or ''}", flush=True)
    print(f"{len(mistakes) - missed} of {len(mistakes)} planted mistakes were caught")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
