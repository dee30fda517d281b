"""The commands of ``fiber-d2``, one module each, with a ``main(argv, prog) -> exit status``."""
