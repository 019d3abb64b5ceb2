"""
bugs.py - the exercises in which you find a bug

The bugs come from tests/planted_mistakes.py, the same list that we use to test the tests. An entry
names a mistake and the script in which it is planted. It does not say what the mistake does, so run
the script and see. The groups come from measurements (`python tests/measure_tries.py bugs`).
"""

LOUD = "loud: the score is near 0, or the script stops"
QUIET = "quiet: the model learns, but the score is worse"
SILENT = "silent: the score is perfect, or nearly so"

BUGS = [  # (group, minutes, script, name of the planted mistake); the exercises are bug_01, ...
    (LOUD, 10, "decoder_only.py", "heads split without a transpose"),
    (LOUD, 10, "decoder_only.py", "embeddings not scaled"),
    (LOUD, 10, "decoder_only.py", "embeddings start with std 1"),
    (LOUD, 10, "decoder_only.py", "softmax over queries"),
    (LOUD, 10, "decoder_only.py", "causal mask hides the present"),
    (LOUD, 15, "decoder_only.py", "causal mask shows one future token"),
    (LOUD, 15, "decoder_only.py", "labels shifted twice"),
    (LOUD, 15, "decoder_only.py", "cached token at the wrong position"),
    (LOUD, 15, "encoder_decoder.py", "cross-attention reads the target"),
    (LOUD, 15, "decoder_only.py", "heads merged without transposing"),
    (QUIET, 15, "decoder_only.py", "gradients never zeroed"),
    (QUIET, 20, "decoder_only.py", "left padding counted as positions"),
    (QUIET, 20, "decoder_only.py", "left padding not masked"),
    (SILENT, 15, "decoder_only.py", "second residual forgotten"),
    (SILENT, 20, "encoder_only.py", "MLM: loss at all positions"),
    (SILENT, 15, "decoder_only.py", "scores not divided by sqrt(K)"),
    (SILENT, 20, "decoder_only.py", "residual from the normalized input"),
    (SILENT, 15, "decoder_only.py", "sine and cosine swapped"),
    (SILENT, 15, "decoder_only.py", "top-p drops the token that crosses p"),
    (SILENT, 10, "decoder_only.py", "top-k keeps one token too many"),
    (SILENT, 15, "decoder_only.py", "penalty rewards negative logits"),
    (SILENT, 20, "encoder_only.py", "mean pooling over padding"),
    (SILENT, 20, "encoder_decoder.py", "cross-attention with the first norm"),
    (SILENT, 25, "encoder_decoder.py", "beams: cache not reordered"),
]
# The interview round plants four of these at once in decoder_only.py.
INTERVIEW = [mistake for _, _, script, mistake in BUGS if script == "decoder_only.py"]
