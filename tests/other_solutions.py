"""Right solutions of the exercises that are written differently from the scripts.

A check must accept them: a solution counts by what it does. {exercise: the function's text}
"""
OTHERS = {
    "encode": '''
    def encode(self, tokens):
        known, found = dict(self.ids), []
        for token in (tokens.split(" ") if isinstance(tokens, str) else tokens):
            found.append(known[token] if token in known else UNK)
        return found
''',
    "pad_rows": '''
def pad_rows(rows, value):
    result = torch.full((len(rows), max(map(len, rows))), value)
    for i, row in enumerate(rows):
        result[i, :len(row)] = torch.tensor(row)
    return result
''',
    "padding_mask": '''
def padding_mask(tokens):
    return tokens.ne(PAD).view(tokens.size(0), 1, 1, tokens.size(1))
''',
    "collate_fn": '''
def collate_fn(items):
    batch = {"digits": [i["digits"] for i in items], "words": [i["words"] for i in items]}
    rows = {"source": [], "decoder_input": [], "labels": [], "pair": [], "pair_labels": []}
    for item in items:
        s, t = item["source"], item["target"]
        for name, row in zip(rows, (s, [SOS, *t], [*t, EOS], [*s, SEP, *t],
                                    [IGNORE_INDEX for _ in s] + t + [EOS])):
            rows[name].append(torch.tensor(row))
    for name, some in rows.items():
        value = IGNORE_INDEX if "labels" in name else PAD
        batch[name] = torch.nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=value)
    for mask, name in (("source_mask", "source"), ("decoder_mask", "decoder_input"),
                       ("pair_mask", "pair")):
        batch[mask] = (batch[name] != PAD).unsqueeze(1).unsqueeze(1)
    return batch
''',
    "exact_match": '''
def exact_match(written, expected):
    right = 0
    for a, b in zip(written, expected):
        if len(a) == len(b) and all(x == y for x, y in zip(a, b)):
            right += 1
    return right / len(written)
''',
    "softmax": '''
def softmax(scores):
    top = scores.max(dim=-1, keepdim=True).values
    return (scores - top - (scores - top).exp().sum(-1, keepdim=True).log()).exp()
''',
    "attention": '''
def attention(queries, keys, values, mask=None, dropout=0.0):
    scores = torch.einsum("bhtk,bhsk->bhts", queries, keys) * queries.size(-1) ** -0.5
    if mask is not None:
        scores = torch.where(mask, scores, torch.full_like(scores, -1e30))
    scores = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = scores / scores.sum(-1, keepdim=True)
    return torch.einsum("bhts,bhsk->bhtk", F.dropout(weights, dropout), values), weights
''',
    "split_heads": '''
    def split_heads(self, x):
        return torch.stack(x.split(self.head_dim, dim=-1), dim=1)
''',
    "merge_heads": '''
    def merge_heads(self, x):
        return torch.cat([x[:, head] for head in range(self.num_heads)], dim=-1)
''',
    "multi_head": '''
    def forward(self, x, memory, mask=None):
        rate = self.dropout if self.training else 0.0
        q, k, v = self.w_q(x), self.w_k(memory), self.w_v(memory)
        result, weights = self.attention_function(*map(self.split_heads, (q, k, v)), mask, rate)
        result = self.merge_heads(result)
        return self.w_o(result), weights
''',
    "causal_mask": '''
def causal_mask(queries, keys, device=None):
    here = torch.arange(keys - queries, keys, device=device)[:, None]
    return (torch.arange(keys, device=device)[None] <= here)[None, None]
''',
    "positions": '''
    def __init__(self, d_model, max_len):
        super().__init__()
        angles = torch.outer(torch.arange(max_len).float(),
                             torch.exp(-math.log(10000.0) * torch.arange(0, d_model, 2) / d_model))
        pairs = torch.stack([angles.sin(), angles.cos()], dim=-1)
        self.register_buffer("table", pairs.view(max_len, d_model), persistent=False)
''',
    "feed_forward": '''
    def forward(self, x):
        x = nn.functional.gelu(self.up(x))
        return self.down(self.dropout(x))
''',
    "encoder_layer": '''
    def forward(self, x, mask=None):
        y = self.norm1(x)
        added, weights = self.self_attention(x=y, memory=y, mask=mask)
        total = self.dropout(added) + x
        return total + self.dropout(self.feed_forward(self.norm2(total))), weights
''',
    "decoder_layer": '''
    def forward(self, x, mask=None, cache=None):
        y = self.norm1(x)
        added, weights = self.self_attention(y, y, mask=mask, cache=cache)
        total = x + self.dropout(added)
        return total + self.dropout(self.feed_forward(self.norm2(total))), weights
''',
    "positions_of": '''
    def positions_of(self, tokens):
        real = (tokens != PAD).long().cumsum(1).clamp(max=1)
        return (real.cumsum(1) - 1).clamp(min=0)
''',
    "compute_loss": '''
def compute_loss(model, batch, **options):
    logits, labels = logits_and_labels(model, batch, **options)
    counts = labels != IGNORE_INDEX
    log_p = logits.log_softmax(-1)[counts]
    return -log_p.gather(1, labels[counts][:, None]).mean()
''',
    "train_epoch": '''
def train_epoch(model, loader, optimizer, scheduler, clip_norm, loss_function=compute_loss):
    losses = []
    for batch in loader:
        model.train()
        model.zero_grad()
        loss = loss_function(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        scheduler.step()
        losses.append(loss.detach())
    return torch.stack(losses).mean().item()
''',
    "lr_factor": '''
def lr_factor(step, total_steps, warmup_steps, final_factor=0.05):
    if warmup_steps > step:
        return (1 + step) / warmup_steps
    share = (step - warmup_steps) / max(1, total_steps - warmup_steps - 1)
    half = math.cos(math.pi * min(share, 1.0) / 2) ** 2
    return half + final_factor * (1 - half)
''',
    "train_step": '''
def train_step(script, model, items, step, optimizer, scaler):
    optimizer.zero_grad()
    device, sums, counts = next(model.parameters()).device, [], []
    chosen = micro_batches(step, len(items))
    for number, indices in chosen.items():
        torch.manual_seed(step * 1000 + number)
        batch = to_device(collate_fn([items[index] for index in indices]), device)
        last = number == max(chosen)
        with contextlib.nullcontext() if last or WORLD == 1 else model.no_sync():
            with torch.autocast(device.type, getattr(torch, PRECISION), PRECISION != "float32"):
                logits, labels = script.logits_and_labels(model, batch)
            log_p = logits.float().log_softmax(-1)
            real = labels != IGNORE_INDEX
            loss = -log_p[real].gather(1, labels[real][:, None]).sum()
            scaler.scale(loss).backward()
        sums.append(loss.item())
        counts.append(real.sum().item())
    totals = torch.tensor([sum(sums), sum(counts)])
    if WORLD > 1:
        dist.all_reduce(totals)
    scaler.unscale_(optimizer)
    for parameter in model.parameters():
        parameter.grad *= WORLD / totals[1].item()
    norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    scaler.step(optimizer)
    scaler.update()
    return (totals[0] / totals[1]).item(), norm.item(), int(totals[1])
''',
    "mask_tokens": '''
def mask_tokens(tokens, mask_share=0.8, random_share=0.1, min_rate=0.15, generator=None):
    words, corrupted = word_positions(tokens), tokens.clone()
    labels = torch.full_like(tokens, IGNORE_INDEX)
    for i, row in enumerate(tokens):
        side = words[i] if torch.rand(1, generator=generator) < 0.5 else \\
            (row >= FIRST_ORDINARY) & ~words[i]
        places = side.nonzero().flatten()
        places = places[torch.randperm(len(places), generator=generator)]
        rate = min_rate + (1 - min_rate) * torch.rand(1, generator=generator).item()
        count = (torch.rand(len(places), generator=generator) < rate).sum().clamp(min=1)
        for place in places[:count].tolist():
            labels[i, place] = row[place]
            draw = torch.rand(1, generator=generator).item()
            if draw < mask_share:
                corrupted[i, place] = MASK
            elif draw < mask_share + random_share:
                corrupted[i, place] = torch.randint(FIRST_ORDINARY, len(VOCABULARY), (1,),
                                                    generator=generator).item()
    return corrupted, labels
''',
    "pooling": '''
    def forward(self, tokens):
        hidden, _ = self.encoder.run_encoder(tokens)
        rows = [vectors[ids != PAD].mean(0) for vectors, ids in zip(hidden, tokens)]
        return self.head(torch.stack(rows))
''',
    "append": '''
    def append(self, keys, values):
        for i in range(keys.size(2)):
            self.keys[:, :, self.length] = keys[:, :, i]
            self.values[:, :, self.length] = values[:, :, i]
            self.length += 1
        return (self.keys.narrow(2, 0, self.length), self.values.narrow(2, 0, self.length))
''',
    "filter_logits": '''
def filter_logits(logits, temperature=1.0, top_k=None, top_p=None):
    logits = logits / temperature
    if top_k is not None:
        lowest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -math.inf)
    if top_p is not None:
        p = logits.softmax(-1)
        higher = (p[:, None, :] * (p[:, None, :] > p[:, :, None])).sum(-1)
        logits = logits.masked_fill(higher >= top_p, -math.inf)
    return logits
''',
    "choose_next_token": '''
def choose_next_token(logits, generated, temperature=0.0, top_k=None, top_p=None,
                      repetition_penalty=1.0, generator=None):
    logits = logits.clone()
    for row, ids in enumerate(generated.tolist()):
        for i in set(ids):
            logits[row, i] = logits[row, i] / repetition_penalty if logits[row, i] > 0 \\
                else logits[row, i] * repetition_penalty
    if not temperature:
        return logits.max(-1).indices
    p = filter_logits(logits, temperature, top_k, top_p).softmax(-1)
    draw = torch.rand(len(p), 1, generator=generator, dtype=p.dtype)
    return (p.cumsum(-1) < draw).sum(-1).clamp(max=p.size(-1) - 1)
''',
    "generate": '''
    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, temperature=0.0, top_k=None, top_p=None,
                 repetition_penalty=1.0, use_cache=True, stop_at=EOS, generator=None):
        longest = max(map(len, prompts))
        tokens = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts])
        pad, ended, answers = tokens == PAD, [False] * len(prompts), [[] for _ in prompts]
        first = pad.sum(1, keepdim=True)
        caches = [layer.self_attention.new_cache(len(prompts), longest + max_new_tokens)
                  for layer in self.layers] if use_cache else None
        with self.evaluation_mode():
            for _ in range(max_new_tokens):
                start = caches[0].length if use_cache else 0
                columns = torch.arange(start, tokens.size(1))
                real = torch.arange(tokens.size(1)) >= first
                hidden, _ = self.run_decoder(tokens[:, start:], real[:, None, None],
                                             (columns - first).clamp(min=0), caches)
                chosen = choose_next_token(
                    self.output(hidden[:, -1]), tokens[:, longest:], temperature, top_k, top_p,
                    repetition_penalty, generator)
                tokens = torch.cat([tokens, chosen[:, None]], 1)
                for i, token in enumerate(chosen.tolist()):
                    answers[i] += [] if ended[i] else [token]
                    ended[i] |= token == stop_at
                if all(ended):
                    break
        return answers
''',
    "cross_attention": '''
    def forward(self, x, mask=None, cache=None, memory=None, memory_mask=None, memory_cache=None):
        y = self.norm1(x)
        x = x + self.dropout(self.self_attention(y, y, mask, cache)[0])
        y, weights = self.cross_attention(self.norm_cross(x), memory, memory_mask, memory_cache)
        x = x + self.dropout(y)
        return x + self.dropout(self.feed_forward(self.norm2(x))), weights
''',
    "best_candidates": '''
def best_candidates(sums, logits, width):
    log_p = logits.view(*sums.shape, -1).log_softmax(-1)
    totals = (sums.unsqueeze(-1) + log_p).flatten(1)
    if width == 1:
        token = logits.max(-1, keepdim=True).indices
        return totals.gather(1, token), torch.zeros_like(token), token
    order = totals.argsort(-1, descending=True)[:, :2 * width]
    vocabulary = log_p.size(-1)
    parent = torch.div(order, vocabulary, rounding_mode="floor")
    return totals.gather(1, order), parent, order - parent * vocabulary
''',
}

# Plausible wrong solutions that a check once accepted: (exercise, a part of it, what was written).
WRONG = [
    ("pad_rows", "[[*row]", "[[*map(float, row)]"),
    ("softmax", "scores.softmax(-1)",
     "(scores - scores.max()).exp() / (scores - scores.max()).exp().sum(-1, keepdim=True)"),
    ("attention", "torch.finfo(scores.dtype).min", "-30.0"),
    ("feed_forward", "self.dropout(F.gelu(self.up(x)))", "F.gelu(self.dropout(self.up(x)))"),
    ("decoder_layer", "self.dropout(", "("),
    ("cross_attention", "self.dropout(", "("),
    ("positions_of", "(tokens != PAD).int().argmax(1, keepdim=True)",
     "(tokens == PAD).sum(1, keepdim=True)"),
    ("train_epoch", "    model.train()\n", ""),
    ("train_epoch", "loss_function(model, batch)", "compute_loss(model, batch)"),
    ("mask_tokens", "generator=generator", "generator=None"),
    ("choose_next_token", "torch.where(scores > 0, scores / repetition_penalty, scores * "
     "repetition_penalty)", "scores - math.log(repetition_penalty)"),
    ("generate", "with self.evaluation_mode():", "if True:"),
]
