"""The parts of `benchmarks/knowledge_neurons.py`, which says what they measure."""
