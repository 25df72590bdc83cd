"""`python -m auto_round` runs `auto-round`. The other commands can be imported from here too."""

from auto_round.cli.main import run, run_best, run_eval, run_light, run_mllm, run_opt_rtn, run_rtn

__all__ = ["run", "run_best", "run_eval", "run_light", "run_mllm", "run_opt_rtn", "run_rtn"]

if __name__ == "__main__":
    raise SystemExit(run())
