"""The pure core: arrays in, arrays out; no I/O, clock, settings or logging."""
