"""What a model directory holds, and how two models differ."""
