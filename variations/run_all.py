"""
run_all.py - run every variation and print one table

Run it:     python variations/run_all.py        (about 3 minutes on one CPU core)

Each variation prints its checks and its measurements, as it does when run alone. The table at the
end compares each with the base, measured in the same run. To keep the run to a few minutes, it uses
one seed. Set FULL = True in a file to see more.
"""
import importlib
import time

import measure

from housekeeping import InputError, run_script

# In reading order, with what the table shows
ORDER = {
    "rotary_positions": "exact match, 7 digits, interpolated",
    "alibi": "exact match on 6 digits",
    "longer_than_trained": "exact match, decoder-only",
    "grouped_queries": "exact match, cache per token",
    "latent_attention": "exact match, cache per token",
    "sliding_window": "exact match, cache for 1024 tokens",
    "flash_attention": "peak memory of forward and backward",
    "modern_decoder": "exact match, cache per token",
}


def main():
    for name in ORDER:  # first, so that a mistake in the last file does not cost the others
        try:
            measure.prepare(vars(importlib.import_module(name)))
        except InputError as error:
            raise InputError(f"variations/{name}.py: {error}") from error
    rows = []
    for name, what in ORDER.items():
        print(f"\n{'=' * 90}\n{name}.py\n{'=' * 90}", flush=True)
        start = time.perf_counter()
        result = importlib.import_module(name).main()
        rows.append((name, what, result, time.perf_counter() - start))
    print(f"\n{'variation':22s}{'measured':38s}{'the base':>24s}{'the variation':>24s}"
          f"{'seconds':>9s}")
    for name, what, result, seconds in rows:
        print(f"{name:22s}{what:38s}{result['base']:>24s}{result['variation']:>24s}{seconds:9.1f}")


if __name__ == "__main__":
    run_script(main)
