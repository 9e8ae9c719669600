"""esparse: expert-level sparsity in Mixture-of-Experts language models."""



