"""`python -m auto_round` is `auto-round`."""

from auto_round.cli.main import run

if __name__ == "__main__":
    raise SystemExit(run())
