"""What was measured: one file per table; `bench.py` runs those about speed."""
