"""What is measured for the record: cases as data, a runner, and generated tables.

python -m benchmarks.run --case hydra_core_d768     measures and records
python -m benchmarks.tables                         writes the tables into the docs
"""
