"""Plant common mistakes in a copy, one at a time: does a test fail for each?

    python tests/planted_mistakes.py                 (about 25 minutes; a row for each mistake)
    python tests/planted_mistakes.py variations      the same with mistakes in variations/
    python tests/planted_mistakes.py guide           the same with mistakes in the guide

Not collected by pytest. A mistake is a text to find and its replacement, applied to every script
that has it.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

MISTAKES = [
    # attention
    ("scores not divided by sqrt(K)", "/ math.sqrt(queries.size(-1))  # (B, H", "  # (B, H"),
    (
        "scores divided by K",
        "/ math.sqrt(queries.size(-1))  # (B, H",
        "/ queries.size(-1)  # (B, H",
    ),
    ("scores multiplied by 1000", "scores = queries @ keys", "scores = 1000 * queries @ keys"),
    (
        "fused kernel scaled twice",
        "F.scaled_dot_product_attention(queries,",
        "F.scaled_dot_product_attention(queries / math.sqrt(queries.size(-1)),",
    ),
    (
        "padding mask on queries",
        "return (tokens != PAD)[:, None, None, :]",
        "return (tokens != PAD)[:, None, :, None]",
    ),
    (
        "inverted mask",
        "scores.masked_fill(~mask, -math.inf)",
        "scores.masked_fill(mask, -math.inf)",
    ),
    (
        "empty rows become NaN",
        "weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0.0)",
        "weights = weights",
    ),
    (
        "weights returned after dropout",
        "return F.dropout(weights, dropout) @ values, weights",
        "weights = F.dropout(weights, dropout); return weights @ values, weights",
    ),
    (
        "dropout on attention in evaluation",
        "dropout = self.dropout if self.training else 0.0",
        "dropout = self.dropout",
    ),
    ("softmax over queries", "torch.softmax(scores, dim=-1)", "torch.softmax(scores, dim=-2)"),
    (
        "heads split without a transpose",
        "return x.view(x.size(0), x.size(1), self.num_heads, self.head_dim).transpose(1, 2)",
        "return x.reshape(x.size(0), self.num_heads, x.size(1), self.head_dim)",
    ),
    (
        "heads merged without transposing",
        "return x.transpose(1, 2).flatten(2)",
        "return x.reshape(x.size(0), x.size(2), -1)",
    ),
    (
        "keys from x instead of memory",
        "self.split_heads(self.w_k(memory))",
        "self.split_heads(self.w_k(x))",
    ),
    # layers
    (
        "residual from the normalized input",
        "x = x + self.dropout(attended)  # subtle",
        "x = normalized + self.dropout(attended)  # subtle",
    ),
    (
        "second residual forgotten",
        "x = x + self.dropout(self.feed_forward(self.norm2(x)))",
        "x = self.dropout(self.feed_forward(self.norm2(x)))",
    ),
    (
        "cross-attention reads the target",
        "self.cross_attention(self.norm_cross(x), memory,",
        "self.cross_attention(self.norm_cross(x), x,",
    ),
    ("sine and cosine swapped", "table[:, 0::2] = torch.sin", "table[:, 0::2] = torch.cos"),
    ("embeddings not tied", "self.output.weight = self.embedding.weight", "pass"),
    ("embeddings start with std 1", "nn.init.normal_(self.embedding.weight, std=0.02)", "pass"),
    # data and labels
    (
        "<EOS> after the padding",
        "labels = pad_rows([target + [EOS] for target in targets], IGNORE_INDEX)",
        "labels = torch.cat([pad_rows(targets, IGNORE_INDEX), "
        "torch.full((len(targets), 1), EOS)], 1)",
    ),
    (
        "labels shifted twice",
        "return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index",
        "return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), "
        "ignore_index",
    ),
    (
        "labels not shifted",
        "decoder_input = pad_rows([[SOS] + target for target in targets], PAD)",
        "decoder_input = pad_rows([target + [EOS] for target in targets], PAD)",
    ),
    (
        "padding counts in the loss",
        "for s, t in zip(sources, targets)],\n                           IGNORE_INDEX)",
        "for s, t in zip(sources, targets)],\n                           PAD)",
    ),
    (
        "digits count in the loss",
        "[IGNORE_INDEX] * len(s) + t + [EOS]",
        "s[1:] + [SEP] + t + [EOS]",
    ),
    (
        "validation sequences also trained on",
        "return ([i for i, out in zip(order, held_out) if not out],",
        "return (order,",
    ),
    # causal mask, cache, generation
    ("causal mask hides the present", ".tril(keys - queries)", ".tril(keys - queries - 1)"),
    ("causal mask ignores the cache", ".tril(keys - queries)", ".tril()"),
    ("causal mask shows one future token", ".tril(keys - queries)", ".tril(keys - queries + 1)"),
    ("positions not passed with the cache", "positions[:, start:end], caches)", "None, caches)"),
    (
        "cached token at the wrong position",
        "positions[:, start:end], caches)",
        "positions[:, start:end] * 0, caches)",
    ),
    (
        "cache overwrites its last entry",
        "self.keys[:, :, self.length:end] = keys",
        "self.keys[:, :, max(0, self.length - 1):max(0, self.length - 1) + keys.size(2)] = keys",
    ),
    ("memory appended to its cache at every step", "        if past > 0:\n", "        if False:\n"),
    ("left padding counted as positions", "- first).clamp(min=0)", "- 0 * first).clamp(min=0)"),
    (
        "left padding not masked",
        "mask = None if real.all() else real[:, None, None, :]",
        "mask = None",
    ),
    (
        "cross-attention without padding mask in generation",
        "self.decode(tokens[:, start:end], memory, memory_mask,",
        "self.decode(tokens[:, start:end], memory, None,",
    ),
    (
        "rows not cut at their <EOS>",
        "return ids[:ids.index(stop_at) + 1] if stop_at in ids else ids",
        "return ids",
    ),
    ("generation stops when the first row stops", "if finished.all():", "if finished.any():"),
    ("top-p drops the token that crosses p", "before < top_p", "before + probabilities <= top_p"),
    (
        "top-k keeps all ties",
        "torch.zeros_like(logits, dtype=torch.bool).scatter(-1, best, True)",
        "logits >= logits.gather(-1, best[:, -1:])",
    ),
    (
        "penalty rewards negative logits",
        "torch.where(scores > 0, scores / repetition_penalty, scores * repetition_penalty)",
        "scores / repetition_penalty",
    ),
    # beam search
    ("beams: cache not reordered", "self_cache.reorder(rows)", "pass"),
    ("beams: all start alive", "sums[:, 0] = 0.0", "sums[:] = 0.0"),
    (
        "beams: length without <EOS>",
        "(sums / length ** length_penalty)",
        "(sums / max(1, length - 1) ** length_penalty)",
    ),
    (
        "beams: stop at the first answer",
        "done = (possible <= best_score).all(1, keepdim=True)",
        "done = (best_score > -math.inf)",
    ),
    (
        "beams: finished hypotheses stay in the beam",
        "sums.masked_fill(ends, -math.inf).topk(width)",
        "sums.topk(width)",
    ),
    ("beams: wrong parent", "index // log_p.size(-1), index %", "index % width, index %"),
    (
        "beams: only the best W candidates",
        "totals, index = totals.topk(2 * width)",
        "totals, index = totals.topk(width)",
    ),
    (
        "beams: width 1 continues after <EOS>",
        "    if width == 1:  # greedy",
        "    if False:  # greedy",
    ),
    # masked language modeling
    (
        "MLM: two draws instead of one",
        "randomized = selected & (action >= mask_share) & (action < mask_share + random_share)",
        "randomized = selected & (rand(batch, length) < random_share)",
    ),
    (
        "MLM: special tokens as replacements",
        "torch.randint(FIRST_ORDINARY, len(VOCABULARY)",
        "torch.randint(0, len(VOCABULARY)",
    ),
    (
        "MLM: loss at all positions",
        "labels = tokens.masked_fill(~selected, IGNORE_INDEX)",
        "labels = tokens.clone()",
    ),
    (
        "MLM: rate fixed at 15%",
        "rate = min_rate + (1 - min_rate) * rand(batch, 1)",
        "rate = torch.full((batch, 1), 0.15)",
    ),
    (
        "mean pooling over padding",
        "pooled = (hidden * real).sum(1) / real.sum(1)",
        "pooled = hidden.mean(1)",
    ),
    # training and evaluation
    ("mean of means in evaluate", "num_correct / num_labels", "num_correct / len(loader)"),
    (
        "gradients never zeroed",
        "optimizer.zero_grad()  # otherwise",
        "pass  # otherwise",
    ),
    (
        "learning rate never warms up",
        "return (step + 1) / warmup_steps",
        "return step / warmup_steps",
    ),
    (
        "uncertainty of positions without a label",
        "entropy = -(log_p.exp() * log_p).sum(-1)  # (B, T)\n"
        "        entropy = entropy.masked_fill(labels == IGNORE_INDEX, -1.0)",
        "entropy = -(log_p.exp() * log_p).sum(-1).masked_fill(labels == IGNORE_INDEX, -1.0)",
    ),
    # whole models
    ("last norm missing", "return self.final_norm(x), all_weights", "return x, all_weights"),
    ("memory not normalized", "return self.encoder_norm(x), all_weights", "return x, all_weights"),
    (
        "cross-attention with the first norm",
        "self.cross_attention(self.norm_cross(x), memory,",
        "self.cross_attention(self.norm1(x), memory,",
    ),
    (
        "feed-forward with the first norm",
        "self.feed_forward(self.norm2(x))",
        "self.feed_forward(self.norm1(x))",
    ),
    (
        "embeddings not scaled",
        "self.embedding_scale = math.sqrt(d_model)",
        "self.embedding_scale = 1",
    ),
    ("GELU by tanh", "F.gelu(self.widen(x))", 'F.gelu(self.widen(x), approximate="tanh")'),
    ("norms with a large epsilon", "nn.LayerNorm(d_model)", "nn.LayerNorm(d_model, eps=1e-3)"),
    # modes
    ("no dropout on embeddings", "        x = self.dropout(x)", "        x = x"),
    (
        "no dropout inside the feed-forward",
        "self.narrow(self.dropout(F.gelu(self.widen(x))))",
        "self.narrow(F.gelu(self.widen(x)))",
    ),
    (
        "evaluation with dropout",
        "    model.eval()\n    device = next(model.parameters()).device\n    loss_sum",
        "    device = next(model.parameters()).device\n    loss_sum",
    ),
    (
        "loaded in training mode",
        ".to(device).eval()\n        model.load",
        ".to(device)\n        model.load",
    ),
    # options
    (
        "translate drops its options",
        "model.generate(prompts, max(map(len, sequences)) + 2, **options)",
        "model.generate(prompts, max(map(len, sequences)) + 2)",
    ),
    (
        "translate drops the length penalty",
        "model.beam_search(sources, beam_width, max_new_tokens=limit, **options)",
        "model.beam_search(sources, beam_width, max_new_tokens=limit)",
    ),
    ("limit of the first row", "max(map(len, sequences)) + 2", "len(sequences[0]) + 2"),
    (
        "penalty counts the prompt",
        "choose_next_token(logits, tokens[:, longest:end],",
        "choose_next_token(logits, tokens[:, :end],",
    ),
    (
        "generator ignored",
        "torch.multinomial(probabilities, 1, generator=generator)",
        "torch.multinomial(probabilities, 1)",
    ),
    ("stop token ignored", "tokens[:, end] == stop_at", "tokens[:, end] == EOS"),
    ("weight decay ignored", "weight_decay=weight_decay,\n", "weight_decay=0.01,\n"),
    (
        "masking rates swapped",
        "mask_tokens(tokens, mask_share, random_share,",
        "mask_tokens(tokens, random_share, mask_share,",
    ),
    (
        "trace of another candidate",
        "sums[0, c].item(), ends[0, c].item())",
        "sums[0, 0].item(), ends[0, c].item())",
    ),
    ("one order for all epochs", "batch_size, shuffle=True", "batch_size, shuffle=False"),
    ("sequences not shuffled", "    rng.shuffle(sequences)\n", ""),
    # the pipeline
    (
        "loss in bfloat16",
        "F.cross_entropy(logits.float().flatten",
        "F.cross_entropy(logits.flatten",
    ),
    ("clipping before unscaling", "    scaler.unscale_(optimizer)\n    for", "    for"),
    (
        "best weights overwritten",
        "v.detach().clone() for k, v in weights",
        "v.detach() for k, v in weights",
    ),
    ("last epoch saved", 'plain_model.load_state_dict(state.record["best_weights"])', "pass"),
    (
        "a group trained twice",
        "state.epoch, state.group = epoch, number + 1",
        "state.epoch, state.group = epoch, number",
    ),
    (
        "changed code resumed",
        'in sorted(set(ROOT.glob("*.py")) - {ROOT / "scratch.py"}):',
        "in [Path(script)]:",
    ),
    ("flipped bits load", "if archive.testzip() is not None:", "if False:"),
    ("random numbers of a micro-batch not seeded", "        seed_micro_batch(step, number)\n", ""),
    ("a process takes the others' micro-batches", "len(group), world))", "len(group)))"),
    ("an idle process adds its gradients", "loss * 0 if idle else loss", "loss"),
    ("labels counted per process", "        dist.all_reduce(totals)\n", ""),
    # comparisons and figures
    (
        "an ablation that changes nothing",
        "                change(model)\n",
        "                pass\n",
    ),
    (
        "few sequences from the held-out ones",
        "sample(list(train_loader.dataset), num_sequences)",
        "sample(list(loaders()[1].dataset), num_sequences)",
    ),
    (
        "a figure with another model's origin",
        "draw_attention(file, title, origins[name],",
        'draw_attention(file, title, origins["encoder-only"],',
    ),
    (
        "processes that do not wait for the last one",
        "            dist.barrier()\n",
        "            pass\n",
    ),
]

FAST_TESTS = [
    "test_blocks.py",
    "test_models.py",
    "test_generation.py",
    "test_training.py",
    "test_dataset.py",
    "test_options.py",
    "test_whole_models.py",
    "test_hugging_face.py",
    "test_compare_and_visualize.py",
    *(
        f"test_train_all.py::test_{name}"
        for name in (
            "clipping_acts_on_unscaled_gradients",
            "the_best_weights_stay_when_later_epochs_are_worse",
            "the_saved_model_is_that_of_the_best_epoch",
            "an_interrupted_epoch_sees_every_group_exactly_once",
            "changed_code_starts_a_run_from_scratch",
            "a_micro_batch_does_not_depend_on_earlier_draws",
            "two_processes_give_the_losses_of_one",
            "a_process_that_aborts_at_its_end_loses_nothing",
        )
    ),
    "-k",  # not the tests that run whole scripts for long
    "not run_of and not small_budgets",
]

MISTAKES_IN_VARIATIONS = [
    (
        "longer: distances without a sign",
        "(distances.clamp(-CLIP, CLIP) + CLIP)",
        "(distances.abs().clamp(-CLIP, CLIP) + CLIP)",
    ),
    (
        "longer: vectors not divided by sqrt(K)",
        "queries @ self.table.T / math.sqrt(self.head_dim)",
        "queries @ self.table.T",
    ),
    (
        "longer: the count does not restart",
        "columns - middle, super()",
        "columns, super()",
    ),
    ("longer: source positions of the target", "if self.is_cross else here", "if False else here"),
    (
        "longer: <EOS> missing in the source",
        '"source": item["source"] + [EOS]}',
        '"source": item["source"]}',
    ),
    (
        "longer: cached positions off by one",
        "self.positions[:, start:self.length] = positions",
        "self.positions[:, start:self.length] = positions + (start > 0)",
    ),
    (
        "rotary: keys not rotated",
        "keys = rotate(self.split_heads(self.w_k(memory)), self.rotary.angles)",
        "keys = self.split_heads(self.w_k(memory))",
    ),
    (
        "rotary: queries not rotated",
        "queries = rotate(self.split_heads(self.w_q(x)), self.rotary.angles)",
        "queries = self.split_heads(self.w_q(x))",
    ),
    ("rotary: pairs from two halves", "x[..., 0::2], x[..., 1::2]", "x.chunk(2, -1)"),
    (
        "rotary: half the speed",
        "10000.0 ** (-pairs / head_dim)",
        "10000.0 ** (-pairs / head_dim) / 2",
    ),
    ("rotary: positions multiplied", "/ self.interpolation", "* self.interpolation"),
    (
        "ALiBi: slopes of the next power",
        "2 ** math.floor(math.log2(num_heads))",
        "2 ** math.ceil(math.log2(num_heads))",
    ),
    ("ALiBi: other slopes in between", "range(0, 2 * power, 2)", "range(1, 2 * power, 2)"),
    (
        "ALiBi: keys counted backward",
        "[:, None] - torch.arange(keys)  # (T, S)",
        "[:, None] - torch.arange(keys).flip(0)  # (T, S)",
    ),
    (
        "ALiBi: distance is rewarded",
        "scores = scores - penalty",
        "scores = scores + penalty",
    ),
    (
        "grouped: means of every second head",
        "value.view(key_heads, heads // key_heads, -1, *value.shape[1:])",
        "value.view(heads // key_heads, key_heads, -1, *value.shape[1:]).transpose(0, 1)",
    ),
    (
        "grouped: a cache for all heads",
        "num_heads=self.key_heads, head_dim",
        "num_heads=self.num_heads, head_dim",
    ),
    ("latent: divided by the root of its size", " * (self.latent_dim / self.head_dim) ** 0.5", ""),
    ("latent: values expanded like keys", "up_v = self.w_v.weight", "up_v = self.w_k.weight"),
    (
        "latent: only the new latents are used",
        "latents = cache.append(latents)",
        "cache.append(latents)",
    ),
    ("window: one too long", "(distance < self.window)", "(distance <= self.window)"),
    (
        "window: none for a single token",
        "mask = near if mask is None else",
        "mask = None if mask is None else",
    ),
    (
        "window: the oldest entries are kept",
        "= keys[:, :, -used:]",
        "= keys[:, :, :used]",
    ),
    ("window: mask of the first columns", "mask[..., -total:]", "mask[..., :total]"),
    ("tiles: the sum is not rescaled", "total = total * shrink +", "total = total +"),
    (
        "tiles: the average is not rescaled",
        "weighted = weighted * shrink +",
        "weighted = weighted +",
    ),
    (
        "tiles: nothing to attend to is NaN",
        "base = new_largest.masked_fill(new_largest == -math.inf, 0.0)",
        "base = new_largest",
    ),
    ("tiles: gradient without the sum", "(d_weights - sums[:, :, rows])", "d_weights"),
    (
        "tiles: all in one tile",
        "[slice(start, start + TILE) for start in range(0, length, TILE)]",
        "[slice(0, length)]",
    ),
    (
        "modern: epsilon outside the root",
        "torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps)",
        "(torch.sqrt((x * x).mean(-1, keepdim=True)) + self.eps)",
    ),
    (
        "modern: gate and value swapped",
        "F.silu(self.gate(x)) * self.widen(x)",
        "self.gate(x) * F.silu(self.widen(x))",
    ),
    (
        "modern: keys not rotated",
        "rotate(self.split_keys(self.w_k(memory)), self.rotary.angles)",
        "self.split_keys(self.w_k(memory))",
    ),
    ("modern: biases stay", "            module.bias = None\n", "            pass\n"),
]

MISTAKES_IN_THE_GUIDE = [
    ("dead anchor", "(inference.md#keyvalue-cache)", "(inference.md#key-value-cache)"),
    ("dead chapter", "(training.md#mixed-precision)", "(trainings.md#mixed-precision)"),
    ("chapter not linked", "[Troubleshooting](guide/troubleshooting.md)", "Troubleshooting"),
    ("wrong next chapter", "next: [Training](training.md)", "next: [Training](inference.md)"),
    ("section not in the contents", "[gibberish](#gibberish)", "gibberish"),
    (
        "dead file link",
        "[`tests/test_alike.py`](../tests/test_alike.py)",
        "[`tests/test_alike.py`](../tests/test_alikes.py)",
    ),
    ("unknown method", "`MultiHeadAttention.split_heads`", "`MultiHeadAttention.cut_heads`"),
    (
        "name in the wrong file",
        "[`bookkeeping.py`](../bookkeeping.py), `load_unfinished`",
        "[`train_all.py`](../train_all.py), `load_unfinished`",
    ),
    (
        "test that does not exist",
        "`test_an_epoch_equals_a_plain_training_loop`",
        "`test_an_epoch_equals_a_training_loop`",
    ),
    ("wrong default", "| heads (`NUM_HEADS`) | 4 |", "| heads (`NUM_HEADS`) | 8 |"),
    ("wrong betas", "| betas | 0.9, 0.999 |", "| betas | 0.9, 0.95 |"),
    ("wrong epochs", "6 to 8 epochs of 85 steps", "6 to 8 epochs of 58 steps"),
    ("wrong sizes", "101,760 to 235,392", "101,786 to 235,392"),
    ("wrong output of a snippet", "std of q.k   2.0", "std of q.k   2.2"),
    ("wrong entropy", "by layer: [0.8, 0.0]", "by layer: [0.5, 0.0]"),
    (
        "wrong formula in a snippet",
        "12 * T * D * D + 2 * T * T * D",
        "12 * T * D * D + 4 * T * T * D",
    ),
    (
        "snippet that fails",
        "from encoder_only import PositionalEncoding\n\ntable",
        "from encoder_only import PositionEncoding\n\ntable",
    ),
    (
        "wrong number in a measured table",
        "| decoder-only | 101,760 | 3.1 | 6 |",
        "| decoder-only | 101,760 | 3.1 | 5 |",
    ),
    (
        "time wrong by a factor of 100",
        "| encoder-only | 101,786 | 3.1 | 1 |",
        "| encoder-only | 101,786 | 310.0 | 1 |",
    ),
    (
        "tolerance too wide to hold anything",
        "exact match, % (±1) |\n|---|---|---|---|---|\n| encoder-only | 101",
        "exact match, % (±90) |\n|---|---|---|---|---|\n| encoder-only | 101",
    ),
    (
        "invented line of output",
        "per digit.\n```\n\nThe last",
        "per digit.\nAll is well.\n```\n\nThe last",
    ),
    (
        "excerpt that differs",
        "q.size(-1) ** 0.5  # (B, HEADS, T, T)",
        "D ** 0.5  # (B, HEADS, T, T)",
    ),
    ("wrong percentage", "still reaches 88%", "still reaches 36%"),
    ("wrong number of sequences", "111,110 sequences", "99,999 sequences"),
    ("wrong number of mistakes", "plants 94 mistakes", "plants 58 mistakes"),
    (
        "table without a source",
        "Sources: the papers named in the cells;",
        "The papers named in the cells;",
    ),
    (
        "percentage without a source",
        "The sections follow a token",
        "Most readers, 90%, like it.\n\nThe sections follow a token",
    ),
    ("citation without an entry", "(Sennrich et al. 2016)", "(Sennrich et al. 2017)"),
    ("wrong year of a paper", "Hoffmann et al. 2022, [Training", "Hoffmann et al. 2026, [Training"),
    (
        "minutes that do not add up",
        "| read the output of the comparison | `python compare_architectures.py` | 20 |",
        "| read the output of the comparison | `python compare_architectures.py` | 30 |",
    ),
    ("wrong line count", "beam search | 898 | 50 |", "beam search | 719 | 50 |"),
    (
        "command that does not exist",
        "`python visualizations.py` | draws",
        "`python visualisations.py` | draws",
    ),
    ("pytest -k that selects nothing", "-k never_nan", "-k never_nans"),
    ("missing figure", "figures/masks.png)", "figures/mask.png)"),
    ("missing question", "<b>7. What do attention", "<b>8. What do attention"),
    ("constant that does not exist", "`PROFILE_STEPS = 5`", "`PROFILING_STEPS = 5`"),
]
# First the tests that run no script, then those that run quick_start.py or toy_dataset.py.
GUIDE_TESTS = [
    "not run_of and not short_command and not text_to_replace",
    "run_of_quick_start or run_of_toy",
]


def plant(old, new, paths):
    """Replace `old` with `new` in each of `paths` that contains it. Return how many do."""
    planted = 0
    for path in paths:
        text = path.read_text(encoding="utf-8")
        if old in text:
            path.write_text(text.replace(old, new), encoding="utf-8")
            planted += 1
    return planted


def first_failure(folder, *arguments):
    """The first test that fails in `folder` with these pytest arguments, or None."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            *arguments,
        ],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    found = re.search(
        r"^(?:FAILED|ERROR) \S*?(test_\w+\.py(?:::\w+)?)", done.stdout, flags=re.MULTILINE
    )
    return found and found[1]


def main():
    what = sys.argv[1] if len(sys.argv) > 1 else "scripts"
    mistakes, places, tests = {
        "scripts": (MISTAKES, ["*.py"], [FAST_TESTS]),
        "variations": (MISTAKES_IN_VARIATIONS, ["variations/*.py"], [["test_variations.py"]]),
        "guide": (
            MISTAKES_IN_THE_GUIDE,
            ["*.md", "guide/*.md", "variations/*.md"],
            [["test_guide.py", "-k", chosen] for chosen in GUIDE_TESTS],
        ),
    }[what]
    missed = 0
    for name, old, new in mistakes:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "collection"
            shutil.copytree(
                ROOT,
                copy,
                ignore=shutil.ignore_patterns(".git", "checkpoints", "__pycache__", ".*cache"),
            )
            planted = plant(old, new, [path for place in places for path in copy.glob(place)])
            if not planted:
                print(f"{'NOT FOUND':9s} {name}: no file contains the text to replace", flush=True)
                missed += 1
                continue
            found = None
            for chosen in tests:
                found = found or first_failure(
                    copy, *(re.sub("^test_", "tests/test_", test) for test in chosen)
                )
            missed += found is None
            print(
                f"{'caught' if found else 'MISSED':9s} {name:48s} in {planted}   {found or ''}",
                flush=True,
            )
    print(f"{len(mistakes) - missed} of {len(mistakes)} planted mistakes were caught")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
