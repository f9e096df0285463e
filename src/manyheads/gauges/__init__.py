"""Instruments: interleaved timing, peak memory of a fresh process, the conditions."""
