"""Stage 3: from tensors, wherever they live and however they are strided, to contiguous host bytes."""
