"""The layers of a model, dense and decomposed: their shape, their trace, a plan applied to them."""
