"""The program ``advkd``, also by ``python -m advkd`` and ``python -m advkd.cli``."""

from .runtime.launcher import end_at_interrupt


def main() -> None:
    """Run the command line; an interrupt ends it with one line, also while its modules are imported."""
    end_at_interrupt()
    from .cli.main import main as run

    run(prog_name="advkd")


if __name__ == "__main__":
    main()
