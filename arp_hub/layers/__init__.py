"""Dense and low-rank layers, and the models that hold them: shapes, checks, traces, and plans applied."""
