"""What runs inside a worker: data, models, losses, families, the engine, evaluation. Imports no ray."""
