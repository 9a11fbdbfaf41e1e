"""The program ``advkd``, also by ``python -m advkd``: the command line of :mod:`advkd.cli`."""

from .launcher import end_at_interrupt


def main():
    """Run the command line; an interrupt ends it with one line, also while its modules are imported."""
    end_at_interrupt()
    from .cli import main as run

    run(prog_name="advkd")


if __name__ == "__main__":
    main()
