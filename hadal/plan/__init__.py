"""Planning: what fits where (pure arithmetic on configurations; no torch)."""
