"""What surrounds an adapter: the frozen base that it is trained on, and the plain model that is made of both."""
