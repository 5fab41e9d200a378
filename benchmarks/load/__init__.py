"""What speculation gains and costs at every load (`make bench-load`)."""

FIXED = ("-m", "benchmarks.load.fixed", "serve", "--port", "0")  # a command of `local_server`
