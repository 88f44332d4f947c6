"""The parts of ``bench_layers``: what is measured (cases), how (steps), in a process of its own (run), against what."""
