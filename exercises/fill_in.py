"""
fill_in.py - the exercises in which you write the body of one function

Each entry names a script and a function in it. practice.py cuts the function's body out of a copy
of the script, so there is no second text that could become outdated. The docstring stays: it has
the shapes and a small example. Each exercise needs only what came before it.
"""
from typing import NamedTuple


class Blank(NamedTuple):
    name: str
    group: str
    minutes: int
    script: str
    place: str  # the function, or the class and its method
    task: str
    right: str  # what "right" means
    hints: tuple  # three: from a question to the place


BLANKS = [
    # --- The data ---
    Blank("encode", "the data", 5, "toy_dataset.py", "Vocabulary.encode",
          "Turn tokens into ids. The argument is a list of tokens, or a string of tokens with "
          "spaces between them. A token that the vocabulary does not have becomes <UNK>.",
          "Both kinds of input give the same ids, and no token is dropped.",
          ("Which of the two kinds of input is easier, and how does the other one become it?",
           "self.ids is a dictionary. What does its method get do with a key that is missing?",
           "First make a list of the string, then look up each token, with UNK as the default.")),
    Blank("pad_rows", "the data", 5, "toy_dataset.py", "pad_rows",
          "A tensor needs rows of equal length. Fill shorter rows on the right with `value`.",
          "The longest row is unchanged, and so are the lists that came in.",
          ("How long must every row of the result be?",
           "How many times must `value` be appended to a row of length n?",
           "Build a list of lists of equal length, and give it to torch.tensor.")),
    Blank("padding_mask", "the data", 5, "toy_dataset.py", "padding_mask",
          "Say which tokens may be attended to. The result is compared with scores of shape (B, H, "
          "T, S), so it needs four dimensions.",
          "True means: may attend. Padding is masked as a key, for every head and every query.",
          ("Which token must never be attended to?",
           "Two of the four dimensions have size 1. Which ones, if keys are the last dimension?",
           "A comparison gives (B, S). Indexing with None inserts a dimension.")),
    Blank("collate_fn", "the data", 20, "toy_dataset.py", "collate_fn",
          "Turn a list of items into one batch for all three architectures. The drawing in the "
          "docstring shows each tensor. The labels are the input, shifted by one position.",
          "Read each column of the drawing from top to bottom: the model is trained on that pair.",
          ("At which position must the model predict <EOS>, and in which tensors does it occur?",
           "Which value pads labels, and which one pads inputs? Why not the same?",
           "Append <EOS> to each row of its own *before* you pad.")),
    Blank("exact_match", "the data", 5, "toy_dataset.py", "exact_match",
          "Return the fraction of rows that are equal to the expected ones, from start to end.",
          "An answer that begins correctly but has extra words does not count.",
          ("Is [four, zero, seven] a correct answer to 4 0?",
           "Python compares lists element by element, and by length.",
           "Count the equal pairs, and divide once.")),
    # --- Attention ---
    Blank("softmax", "attention", 10, "", "softmax",
          "Turn scores into weights: exp of each score, divided by the sum over the last "
          "dimension.",
          "Rows sum to 1, even for scores of 1000, where exp overflows.",
          ("What is exp(1000) in float32, and what is infinity divided by infinity?",
           "What happens to the weights if you subtract the same number from all scores of a row?",
           "Subtract each row's largest score first, and keep the dimension when you sum.")),
    Blank("attention", "attention", 15, "decoder_only.py", "attention",
          "Compare each query with each key, and average the values with the weights that come "
          "out. Return the result and the weights.",
          "softmax(q k^T / sqrt(K)) v, with masked keys at weight 0. A query without keys gets "
          "finite numbers.",
          ("Which two dimensions of the keys must change places for the product (B, H, T, S)?",
           "By which number do you divide: D, K, or a root of one of them?",
           "Fill masked scores with the lowest finite number of their type before the softmax.")),
    Blank("split_heads", "attention", 10, "decoder_only.py", "MultiHeadAttention.split_heads",
          "Give each head its own part of every token's numbers.",
          "Head 0 gets the first K numbers of *each* token, as in the docstring's drawing.",
          ("Which order of dimensions do the numbers have in memory: tokens first, or heads first?",
           "view cannot reorder numbers. Which shape can you reach with it alone?",
           "First (B, S, H, K), then exchange two dimensions.")),
    Blank("merge_heads", "attention", 5, "decoder_only.py", "MultiHeadAttention.merge_heads",
          "Undo split_heads: put the results of all heads of a token next to each other.",
          "merge_heads(split_heads(x)) is x.",
          ("What did split_heads do last? Undo that first.",
           "Which two dimensions become one of size D?",
           "Exchange heads and tokens, then flatten the last two dimensions.")),
    Blank("multi_head", "attention", 15, "encoder_only.py", "MultiHeadAttention.forward",
          "Put the parts together: project, split, attend, merge, project. self.attention_function "
          "is the function `attention`.",
          "Queries come from x, keys and values from memory. Dropout works in training only.",
          ("Which of the four matrices sees x, and which ones see memory?",
           "Where does a module say whether it is in training?",
           "The last matrix mixes what the heads have found, so it comes after merging.")),
    Blank("causal_mask", "attention", 5, "decoder_only.py", "causal_mask",
          "Say which keys each query may attend to: those up to its own position.",
          "The last query has the position of the last key, even if there are more keys than "
          "queries.",
          ("Which row of the mask is full of True?",
           "tril keeps a lower triangle. What does its argument `diagonal` move?",
           "With as many extra keys as are cached, the triangle moves to the right by as many.")),
    # --- The block ---
    Blank("positions", "the block", 15, "decoder_only.py", "PositionalEncoding.__init__",
          "Build the table of sines and cosines, (max_len, D), and register it as a buffer named "
          "`table` that is not saved.",
          "Even dimensions are sines and odd ones cosines, and a pair shares its frequency.",
          ("How many different frequencies does a vector of 64 numbers have?",
           "What does a slice with a step of 2 select?",
           "Multiply positions (max_len, 1) by frequencies (D / 2,): every pair in one product.")),
    Blank("feed_forward", "the block", 5, "decoder_only.py", "FeedForward.forward",
          "Two linear layers with GELU between them. Dropout comes after the nonlinearity.",
          "Each position is processed on its own, and the shape stays the same.",
          ("What would two linear layers without anything between them be equal to?",
           "Which layer makes the vector longer?",
           "From the inside out: up, GELU, dropout, down.")),
    Blank("encoder_layer", "the block", 15, "encoder_only.py", "EncoderLayer.forward",
          "One layer: attention and the feed-forward network, each on a normalized input, each "
          "added to what came in. Return the result and the attention weights.",
          "x = x + part(norm(x)), twice. The sum itself is never normalized.",
          ("What does a residual connection add to: the input, or the normalized input?",
           "How many times do you need norm1, and how many times norm2?",
           "Attention gets the normalized input as queries and as memory.")),
    Blank("decoder_layer", "the block", 10, "decoder_only.py", "DecoderLayer.forward",
          "The same for a GPT, with a cache that is handed on to attention.",
          "With a cache, only new tokens are in x, and the result is the same.",
          ("What is different from the encoder's layer, apart from the mask that comes in?",
           "Who stores keys and values: the layer, or its attention?",
           "The cache is the fourth argument of attention.")),
    Blank("positions_of", "the block", 10, "decoder_only.py", "DecoderOnlyTransformer.positions_of",
          "Prompts of different lengths are padded on the left. Count positions from the first "
          "real token of each row.",
          "The first real token has position 0, and padding never has a negative position.",
          ("In which column does a row's first real token stand?",
           "argmax of zeros and ones finds the first one.",
           "Subtract that column from all columns, and stop at 0.")),
    # --- Training ---
    Blank("compute_loss", "training", 10, "decoder_only.py", "compute_loss",
          "Return the mean cross-entropy of the labels of one batch. logits_and_labels has already "
          "run the model, and collate_fn has already shifted the labels.",
          "Labels equal to IGNORE_INDEX count toward neither the sum nor the number of labels.",
          ("F.cross_entropy wants one row of logits per label. Which dimensions become one?",
           "What happens if you shift labels that are shifted already?",
           "Flatten both, and tell F.cross_entropy which label to ignore.")),
    Blank("train_epoch", "training", 15, "decoder_only.py", "train_epoch",
          "One pass over the loader: loss, gradients, clipping, and a step for each batch. Return "
          "the mean of the losses.",
          "Each step uses the gradient of its own batch only, clipped to clip_norm.",
          ("backward() adds to what is already in .grad. When is that wrong?",
           "Which of these two comes first: clipping, or the optimizer's step?",
           "The scheduler makes one step per batch, after the optimizer.")),
    Blank("lr_factor", "training", 10, "training.py", "lr_factor",
          "The factor for the learning rate: a line up to 1 in warmup_steps, then half a cosine "
          "down to final_factor.",
          "No step has a rate of 0, the peak is 1, and the last step has final_factor.",
          ("What does a learning rate of 0 in the first step change?",
           "Which part of the cosine goes from 1 down to -1, and how do you move it to 1 and 0?",
           "progress runs from 0 to 1 after warmup, and stays at 1 beyond the last step.")),
    Blank("train_step", "training", 45, "train_all.py", "train_step",
          "Gradient accumulation: several micro-batches, one step. The result is the gradient of "
          "the mean loss over *all* labels of the step, under PRECISION, with the scaler, and in "
          "WORLD processes. micro_batches and script.logits_and_labels do part of the work, and "
          "dist.all_reduce sums a tensor over the processes. Each micro-batch sets a seed of its "
          "own, from SEED, step, and number (any formula that differs between them).",
          "Micro-batches of different lengths give the gradient of the whole batch.",
          ("Two micro-batches have 30 labels and 2. Is the mean of their means the mean?",
           "Sum the losses. By what do you divide, and when?",
           "Divide the gradients once, after the last backward pass and before clipping.")),
    # --- BERT ---
    Blank("mask_tokens", "BERT", 25, "encoder_only.py", "mask_tokens",
          "Masked language modeling: select some tokens of one side of each row; mask 80%, replace "
          "10%, keep 10%. Return the corrupted tokens and the labels.",
          "Only selected tokens have labels. <SEP> and <PAD> are never selected, and each row has "
          "at least one label.",
          ("What is the label of a selected token that stays as it is?",
           "One random number decides among three actions. What goes wrong with two?",
           "Draw the side and the rate per row, then compare one number per token with the rate.")),
    Blank("pooling", "BERT", 10, "encoder_only.py", "MatchClassifier.forward",
          "Classify a whole row: average the vectors of its real tokens, and apply the new layer.",
          "A row's prediction does not depend on how much padding it has.",
          ("By which number do you divide for a row of 5 tokens that is padded to 9?",
           "How does a mask of (B, 1, 1, S) become one of (B, S, 1)?",
           "Multiply by the mask before you sum, and divide by the sum of the mask.")),
    # --- Generation ---
    Blank("append", "generation", 10, "decoder_only.py", "KeyValueCache.append",
          "Store new keys and values after the ones that are cached, and return all so far.",
          "However many pieces the tokens come in, the cache ends up the same.",
          ("Where does the next free column begin?",
           "self.keys has room for max_len tokens. Which part of it is valid?",
           "Write into a slice, move the length, return a slice from 0.")),
    Blank("filter_logits", "generation", 20, "decoder_only.py", "filter_logits",
          "Temperature, then top-k, then top-p among what is left: exclude tokens by setting "
          "their logits to -inf.",
          "The token that crosses p stays. With k = 1, one token is left.",
          ("Is a token excluded by its own probability, or by the sum of those before it?",
           "All of this is easy if the logits are sorted. How do they get back into their order?",
           "Sort once, cut by rank and by the sum before, scatter back.")),
    Blank("choose_next_token", "generation", 15, "decoder_only.py", "choose_next_token",
          "Choose the next token of each row: greedily at temperature 0, and by sampling from the "
          "filtered distribution otherwise. A repetition penalty lowers what was generated before.",
          "The penalty makes a token less likely, whatever the sign of its logit.",
          ("What does dividing by 2 do to a logit of -4? Does it become less likely?",
           "gather reads the logits of given tokens, and scatter writes them.",
           "The penalty comes first, for greedy generation, too.")),
    Blank("generate", "generation", 30, "decoder_only.py", "DecoderOnlyTransformer.generate",
          "The loop: send what is not cached, choose a token, append it, stop. Prompts are padded "
          "on the left.",
          "A batch gives the same answers as its rows alone, and the cache changes nothing.",
          ("What do positions and masks look like if a short prompt is padded on the left?",
           "How many columns has the cache already seen, and which ones are new?",
           "Allocate room for all new tokens first, and write each into its column.")),
    # --- T5 ---
    Blank("cross_attention", "T5", 15, "encoder_decoder.py", "DecoderLayer.forward",
          "The decoder's layer with cross-attention between self-attention and the feed-forward "
          "network. Return the result and the weights of cross-attention.",
          "Queries come from the target, keys and values from memory, and memory has its own mask.",
          ("Which of the two attentions needs a causal mask, and why not the other?",
           "There are three norms. Which one belongs to cross-attention?",
           "memory is already normalized, so only x passes through norm_cross.")),
    Blank("best_candidates", "T5", 20, "encoder_decoder.py", "best_candidates",
          "One step of beam search: extend each of W hypotheses by each token, and keep the best "
          "2W of each source.",
          "Sums are of log-probabilities, and each candidate knows its parent.",
          ("Can you add logits of two steps? What must they become first?",
           "topk over W * V numbers gives an index. How do you get back two numbers?",
           "Divide by V for the parent, and take the remainder for the token.")),
    # --- All of it ---
    Blank("tiny_gpt", "all of it", 90, "tiny_gpt.py", "",
          "Write a whole GPT from the docstring. Your file must define `encode(number)`, which "
          "turns \"407\" into the ids of `4 0 7 = four zero seven .` (`.` is 0, `=` is 1, then "
          "come ten digits and ten words), a trained `model` that turns ids "
          "(B, T) into logits (B, T, 22), and `generate(model, tokens, count)`, which appends "
          "`count` tokens to a tensor (1, T). Numbers have one to five digits, such as \"007\". "
          "The check runs your file, training included, for at most five minutes.",
          "No later token changes an earlier prediction, and 95 of 100 numbers are right.",
          ("Which parts does a GPT have, from ids to logits? Draw them before you write.",
           "What is the label at `=`, and which positions do not count?",
           "If the loss is fine and the answers are not, look for a leak. Which token sees what?")),
]
