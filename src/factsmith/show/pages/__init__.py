"""Neurons as HTML pages: one neuron's card, all neurons of a layer, and an index of the layers.

neurons  card_page, layer_page, write_pages
layers   the data of a layer's page and of the index page
page     what all pages share: text, templates, files
"""
