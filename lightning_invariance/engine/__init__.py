"""One evaluation: the walk over the ST matrix, and what it computes of every layer."""
