"""The lecture's claims, one a file: ``python -m experiments.lecture.CLAIM`` shows what it claims, in a minute or two."""
