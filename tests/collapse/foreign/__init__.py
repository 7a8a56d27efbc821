"""Networks of other code bases, each with its own conversion, which ``repvgg.reparameterize`` has to match."""
