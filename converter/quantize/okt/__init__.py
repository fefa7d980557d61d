"""OKT: the Kronecker rotation that the linears of an input group share, learned for rows that binarize well."""
