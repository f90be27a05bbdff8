"""Work that outgrows one machine, on Ray: corpora, target searches, campaigns.

with Ray(workers=8):
    second_moments(lm, texts, [3, 4, 5])
"""
