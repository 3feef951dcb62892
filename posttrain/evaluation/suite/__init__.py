"""`gemma2 eval --suite`: the published tasks over our scorer and sampler, with samples that resume."""
