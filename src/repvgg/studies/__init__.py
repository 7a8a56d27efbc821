"""The studies: each runs something whole, measures it and writes down what came out."""
