"""Make the adjacency matrix that the demo model starts from, out of its own self-made text (tools/train_eagle3.py
generate).

    python tools/warm_store.py --out assets/smollm2-135m-store.safetensors

Every token of the text updates its row as in a live run, so the file holds what a user who had generated that text
would have. Then it prints, on held-out text, how often the r-th token of a row comes next, and how often the text goes
on as after an m-token match: the figures behind RANK_PROBABILITIES and MATCH_PROBABILITIES in retrieval.py.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
from demo_model import tool  # noqa: E402
from model import load_model  # noqa: E402
from retrieval import AdjacencyMatrix, NGramIndex, save_stores  # noqa: E402
from run import writable  # noqa: E402
from train_eagle3 import data_folder, model_folder  # noqa: E402


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id (default: the demo model)")
    parser.add_argument("--data", help="folder of self-made text (default: in Graft's cache)")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    writable(args.out, "--out")
    model = load_model(model_folder(args), pack=False)
    H = model.config.hidden_size
    shards = sorted(data_folder(args).glob("shard-*.safetensors"))
    if len(shards) < 2:
        raise SystemExit("error: fewer than two shards of self-made text; run tools/train_eagle3.py generate first")
    matrix = AdjacencyMatrix(model.config.vocab_size)
    texts = [safe_open(path, "pt") for path in shards[1:]]             # the first is held out
    if any("features" not in text.keys() for text in texts):
        raise SystemExit(f"error: {data_folder(args)} holds shards without features, as a GPU writes them; "
                         "'tools/train_eagle3.py text FILE' puts their text into a file, "
                         "'--device cpu --data NEW text --read FILE' makes shards with features of it: pass --data NEW")
    tokens = [text.get_tensor("tokens").long() for text in texts]
    everything = torch.cat(tokens)
    last = torch.full((model.config.vocab_size,), -1).scatter_reduce_(
        0, everything, torch.arange(len(everything)), "amax")
    for number, (text, part) in enumerate(zip(texts, torch.arange(len(everything)).split([len(t) for t in tokens]))):
        # a row keeps its last writing, so only that is computed
        here = (last[everything[part]] == part).nonzero()[:, 0]
        features = text.get_tensor("features")[here, 3 * H:]
        for rows, feature in zip(here.split(512), features.split(512)):
            matrix.update(tokens[number][rows], model.lm_head(model.norm(feature.to(model.dtype))))
        print(f"\r{number + 1} of {len(texts)} shards: {int((matrix.rows[:, 0] >= 0).sum())} rows written",
              end="", flush=True)
    print()
    held = load_file(shards[0])
    ranks, seen, at = torch.zeros(matrix.rows.shape[1]), 0, 0
    hits, tries = [0] * 10, [0] * 10
    for size, answer_from in held["lengths"].tolist():
        tokens = held["tokens"][at:at + size].long()
        at += size
        here, after = tokens[answer_from - 1:-1], tokens[answer_from:]
        ranks += (matrix.rows[here] == after[:, None]).float().sum(0)
        seen += len(after)
        index, text = NGramIndex(), tokens.tolist()
        index.append(text[:answer_from])
        for i in range(answer_from, size):
            places = index.matches_of(())
            if places:
                m = max(m for _, m in places)
                guess, _, _ = index.propose(1)
                tries[m] += 1
                hits[m] += bool(guess) and guess[0] == text[i]
            index.append([text[i]])
    print(f"held-out, {seen} answer tokens: rank r comes next with", [round(float(r) / seen, 3) for r in ranks])
    print("best continuation after an m-token match is right with",
          {m: (round(hits[m] / tries[m], 3), tries[m]) for m in range(10) if tries[m]})
    save_stores(args.out, matrix, NGramIndex())


if __name__ == "__main__":
    tool(main)
