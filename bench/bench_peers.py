"""Other libraries on ml-latest-small, with the settings their documentation gives as defaults for explicit ratings.

The split is that of bench_training: a random tenth held out, seeds 0, 1, 2. Fit time is from arrays in memory to a fitted
model. What is not installed is skipped: ``pip install cmfrec libmf implicit scikit-surprise`` (in an environment of their own).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from .bench_training import OURS, SEEDS, BiasOnly, rmse, split_ratings
from .harness import Session, Skipped, once_per_round, use_threads

Array = np.ndarray
Predict = Callable[[Array], Array]  # from pairs of row and column numbers


def ours(pairs: Array, ratings: Array, shape: tuple[int, int], threads: int, seed: int) -> Predict:
    from lowrank_kernels import DeepMatrixCompletion

    return DeepMatrixCompletion(random_state=seed).fit(pairs, ratings).predict


def bias_only(pairs: Array, ratings: Array, shape: tuple[int, int], threads: int, seed: int) -> Predict:
    return BiasOnly().fit(pairs, ratings).predict


def cmfrec(pairs: Array, ratings: Array, shape: tuple[int, int], threads: int, seed: int) -> Predict:
    """``CMF()``: k=40, lambda=10, alternating least squares, biases."""
    from cmfrec import CMF
    from scipy.sparse import coo_matrix

    model = CMF(nthreads=threads, verbose=False, random_state=seed)
    model.fit(coo_matrix((ratings, (pairs[:, 0], pairs[:, 1])), shape=shape))
    return lambda wanted: model.predict(wanted[:, 0], wanted[:, 1])


def libmf(pairs: Array, ratings: Array, shape: tuple[int, int], threads: int, seed: int) -> Predict:
    """LIBMF's documented defaults: k=8, 20 rounds, L2 0.1 (the Python package's own, L1 0.04, do worse).

    The package reads the memory of its arrays as it lies: ``fit`` wants it by rows, ``predict`` by columns.
    """
    from libmf import mf

    engine = mf.MF(nr_threads=threads, quiet=True, lambda_p1=0.0, lambda_q1=0.0, lambda_p2=0.1, lambda_q2=0.1)
    engine.fit(np.ascontiguousarray(np.column_stack([pairs, ratings])))
    return lambda wanted: engine.predict(np.asfortranarray(wanted))


def surprise(pairs: Array, ratings: Array, shape: tuple[int, int], threads: int, seed: int) -> Predict:
    """``SVD()``: 100 factors, 20 epochs; runs on one thread."""
    from surprise import SVD, Dataset, Reader

    data = Dataset(Reader(rating_scale=(0.5, 5)))
    rows = zip(pairs[:, 0].tolist(), pairs[:, 1].tolist(), ratings.tolist(), strict=True)
    model = SVD(random_state=seed).fit(data.construct_trainset([(i, j, value, None) for i, j, value in rows]))
    return lambda wanted: np.array([model.predict(i, j).est for i, j in wanted.tolist()])


def implicit(pairs: Array, ratings: Array, shape: tuple[int, int], threads: int, seed: int) -> Predict:
    raise Skipped("it ranks items from implicit feedback; its documentation has no prediction of ratings")


PEERS: dict[str, tuple[str, Callable[..., Predict]]] = {
    "bias only": ("", bias_only),
    "cmfrec CMF": ("cmfrec", cmfrec),
    "LIBMF": ("libmf", libmf),
    "implicit": ("implicit", implicit),
    "Surprise SVD": ("scikit-surprise", surprise),
    OURS: ("", ours),
}


def run_ratings(session: Session) -> None:
    """RMSE and fit time of every library at hand."""
    at_hand: dict[str, tuple[str, Callable[..., Predict]]] = {}
    for name, (package, fit) in PEERS.items():
        try:
            at_hand[f"{name} {version(package)}" if package else name] = (package, fit)
        except PackageNotFoundError:
            session.skip(f"peers: {name}", f"the package {package} is not installed")
    data = "synthetic" if session.quick else "ml-latest-small"
    for seed in SEEDS[: 1 if session.quick else None]:
        pairs, ratings, test_pairs, test_ratings = split_ratings(session, seed)
        # Row and column numbers without gaps, as most of these libraries want them.
        everything = np.concatenate([pairs, test_pairs])
        numbers = np.column_stack([np.unique(x, return_inverse=True)[1].ravel() for x in everything.T])
        shape = (int(numbers[:, 0].max()) + 1, int(numbers[:, 1].max()) + 1)
        train, test = numbers[: len(pairs)], numbers[len(pairs) :]
        for threads in session.threads:
            session.say(f"peers: {data}, seed {seed}, {threads} thread(s)")
            runs: dict[str, Callable[[], Any]] = {}
            for name, (_, fit) in list(at_hand.items()):
                runs[name] = lambda fit=fit, t=threads, s=seed, p=train, r=ratings, m=shape: fit(p, r, m, t, s)
                try:
                    with use_threads(threads):
                        runs[name]()  # also the warm-up
                except (Skipped, ImportError, OSError) as reason:
                    if not at_hand[name][0]:
                        raise
                    session.skip(f"peers: {name}", str(reason))
                    del runs[name], at_hand[name]
            with use_threads(threads):
                timings, fitted = once_per_round(runs, 1 if session.quick else 3)
            for name, predict in fitted.items():
                got = np.asarray(predict(test), dtype=np.float64)
                unknown = np.isnan(got)  # some libraries do not predict for what they have not seen
                got[unknown] = ratings.mean()
                value = rmse(got, test_ratings)
                if not value < 2 * float(test_ratings.std()):
                    session.fail(f"peers, {name}: RMSE {value:.3f} is no prediction at all")
                    continue
                session.record(
                    "peers",
                    f"{data}, random 90/10, seed {seed}",
                    name,
                    threads=threads,
                    metric="RMSE",
                    value=value,
                    note=f"{int(unknown.sum())} unseen pairs predicted by the mean" if unknown.any() else "",
                    **timings[name].columns(),
                )


PARTS = {"ratings": run_ratings}
