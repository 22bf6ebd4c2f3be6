"""What the papers print: test NLL and active units of tables A and B, and table C's three figures."""

#: Burda, Grosse, Salakhutdinov (2016), table 1, by data set: NLL and active units by layers, objective and k.
IMPORTANCE_WEIGHTED = {
    "mnist": {
        (1, "VAE", 1): (86.76, "19"), (1, "VAE", 5): (86.47, "20"), (1, "VAE", 50): (86.35, "20"),
        (1, "IWAE", 5): (85.54, "22"), (1, "IWAE", 50): (84.78, "25"),
        (2, "VAE", 1): (85.33, "16+5"), (2, "VAE", 5): (85.01, "17+5"), (2, "VAE", 50): (84.78, "17+5"),
        (2, "IWAE", 5): (83.89, "21+5"), (2, "IWAE", 50): (82.90, "26+7"),
    },
    "omniglot28": {
        (1, "VAE", 1): (108.11, "28"), (1, "VAE", 5): (107.62, "28"), (1, "VAE", 50): (107.80, "28"),
        (1, "IWAE", 5): (106.12, "34"), (1, "IWAE", 50): (104.67, "41"),
        (2, "VAE", 1): (107.58, "28+4"), (2, "VAE", 5): (106.31, "30+5"), (2, "VAE", 50): (106.30, "30+5"),
        (2, "IWAE", 5): (104.79, "38+6"), (2, "IWAE", 50): (103.38, "44+7"),
    },
}  # fmt: skip

#: The same paper's table 2: after the second stage, by its objective and k.
SECOND_STAGE = {"mnist": {("IWAE", 50): (84.88, "22"), ("VAE", 1): (86.02, "23")}}

#: Rainforth et al. (2018), table 1: IWAE-64, log p-hat and -KL, each with its spread over four runs.
TIGHTER = {
    "mnist": {
        ("IWAE", 1, 64, None): ((-86.11, 0.10), (-84.52, 0.02), (-1.59, 0.10)),
        ("PIWAE", 4, 16, None): ((-85.68, 0.06), (-84.40, 0.17), (-1.27, 0.18)),
        ("PIWAE", 8, 8, None): ((-85.74, 0.07), (-84.46, 0.06), (-1.28, 0.09)),
        ("MIWAE", 4, 16, None): ((-85.60, 0.07), (-84.56, 0.05), (-1.04, 0.08)),
        ("MIWAE", 8, 8, None): ((-85.69, 0.04), (-84.97, 0.10), (-0.72, 0.11)),
        ("CIWAE", 1, 64, 0.05): ((-85.91, 0.11), (-84.57, 0.09), (-1.34, 0.14)),
        ("CIWAE", 1, 64, 0.5): ((-86.08, 0.08), (-85.24, 0.08), (-0.84, 0.11)),
        ("VAE", 1, 64, None): ((-86.69, 0.08), (-86.21, 0.19), (-0.47, 0.20)),
    },
}
