"""A model of chemical reactions: masked atoms of the product, and whether their maps point at the reactants' atoms that they are.

The package rxnmapper carries an ALBERT for masked tokens of SMILES. The reactions are made by rules of RDKit, which record where
each atom of the product comes from. Rows are plain numbers, names and lists.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

import vlattn_fast as va
from vlattn_fast.interpret.evaluating.token_grounding import map_numbers
from vlattn_lab.real import measures
from vlattn_lab.real.reading import Kept
from vlattn_lab.weights import package

FOLDER = "models/transformers/albert_heads_8_uspto_all_1310k"  # in the package
PER_KIND, ATOMS = 24, 1  # reactions of each kind, and explained atoms of each
KNOWN, NEEDED = 0.5, 0.5  # an explained atom's probability, and the nats that the reactants add to it
TOKEN = re.compile(r"(\[[^\]]+]|Br|Cl|[BCNOSPFIbcnosp]|>>|%[0-9]{2}|.)")
ATOM = re.compile(r"\[.+]|Br|Cl|[BCNOSPFIbcnosp]")

ACIDS = "CC(=O)O O=C(O)c1ccccc1 CC(C)C(=O)O O=C(O)c1ccncc1 O=C(O)C1CCCC1 COc1ccc(C(=O)O)cc1 O=C(O)c1ccc(F)cc1 O=C(O)Cc1cccs1"
ALCOHOLS = "CCO OCc1ccccc1 CC(C)CO OCC1CC1 OCCc1ccccn1"
AMINES = "CCCN NCc1ccccc1 C1COCCN1 NC1CCCCC1 COc1cccc(N)c1 CNCc1ccco1"
HALIDES = "BrCc1ccccc1 CCCBr BrCCC1CCCC1 COC(=O)CBr BrCc1ccc(F)cc1 BrCc1ccncc1"
PHENOLS = "Oc1ccccc1 COc1ccc(O)cc1 N#Cc1ccc(O)cc1 Oc1cccnc1 Oc1ccc(F)cc1"
ARYLS = "Brc1ccccc1 COc1ccc(Br)cc1 Brc1cccnc1 N#Cc1cccc(Br)c1 Brc1ccc(F)cc1"
BORONIC = "OB(O)c1ccccc1 Cc1ccc(B(O)O)cc1 OB(O)c1ccsc1 COc1cccc(B(O)O)c1 OB(O)c1ccc(F)cc1"
AMINE = "[N;!H0;!$(N-C=O);!$(N#*):4]"
KINDS = {  # the rule, two lists of reactants, and reagents, which give no atom
    "amide": (f"[C:1](=[O:2])[OH:3].{AMINE}>>[C:1](=[O:2])[N:4]", ACIDS, AMINES, "CCN(C(C)C)C(C)C.CN(C)C=O"),
    "ester": ("[C:1](=[O:2])[OH:3].[C;!$(C=O):5][OH:4]>>[C:1](=[O:2])[O:4][C:5]", ACIDS, ALCOHOLS, "CN(C)c1ccncc1.ClCCl"),
    "ether": ("[C:1][Br:2].[c:5][OH:4]>>[C:1][O:4][c:5]", HALIDES, PHENOLS, "CC(C)=O.O=C([O-])[O-].[K+].[K+]"),
    "alkylation": (f"[C:1][Br:2].{AMINE}>>[C:1][N:4]", HALIDES, AMINES, "CC#N.O=C([O-])[O-].[K+].[K+]"),
    "suzuki": ("[c:1][Br:2].[c:5][B:4](O)O>>[c:1][c:5]", ARYLS, BORONIC, "C1COCCO1.O.O=C([O-])[O-].[Na+].[Na+]"),
}
OTHERS = ("C", "N", "O", "c", "n", "S", "s", "F", "Cl", "Br")  # atoms, of which a wrong one is the most probable
SLOW = ("integrated_gradients", "smoothgrad")
Row = dict[str, Any]


@dataclass(frozen=True)
class Reaction:
    """The tokens of a SMILES; the places of the reactants' and reagents' atoms; and the places of those that each atom of the
    product may be, several where a molecule is symmetric."""

    number: int
    kind: str
    tokens: Sequence[str]
    sources: Sequence[int]
    truth: Mapping[int, frozenset[int]]

    @property
    def arrow(self) -> int:
        return self.tokens.index(">>")


@dataclass(frozen=True)
class Chemist:
    model: Any
    words: Mapping[str, int]

    def inputs(self, reaction: Reaction, masked: int) -> dict[str, Tensor]:
        ids = torch.tensor([[self.words.get(token, self.words["[UNK]"]) for token in reaction.tokens]])
        ids[0, masked] = self.words["[MASK]"]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def score(self, reaction: Reaction, place: int) -> Callable[[Any], Tensor]:
        """The log-probability (B,) of a masked token."""
        return lambda out: out.logits[:, place].log_softmax(-1)[:, self.words[reaction.tokens[place]]]


def load() -> Chemist:
    from transformers import AlbertForMaskedLM

    folder = package("rxnmapper") / FOLDER
    words = {word: number for number, word in enumerate((folder / "vocab.txt").read_text(encoding="utf-8").splitlines())}
    return Chemist(AlbertForMaskedLM.from_pretrained(folder).eval().requires_grad_(False), words)


def reactions(per_kind: int = PER_KIND, seed: int = 0) -> list[Reaction]:
    """The list: pairs of reactants at random, the same for a seed."""
    from rdkit import Chem
    from rdkit.Chem import AllChem

    draw, listed = random.Random(seed), list[Reaction]()
    for kind, (rule, first, second, reagents) in KINDS.items():
        pairs = [*product(first.split(), second.split())]
        draw.shuffle(pairs)
        rule_of_kind, made = AllChem.ReactionFromSmarts(rule), 0
        for pair in pairs:
            reactants = [Chem.MolFromSmiles(smiles) for smiles in pair]
            products = rule_of_kind.RunReactants(reactants)
            if products and made < per_kind:
                listed.append(_reaction(len(listed), kind, reactants, products[0][0], reagents))
                made += 1
    return listed


def _reaction(number: int, kind: str, reactants: Sequence[Any], made: Any, reagents: str) -> Reaction:
    from rdkit import Chem

    Chem.SanitizeMol(made)
    origins = [(int(atom.GetProp("react_idx")), int(atom.GetProp("react_atom_idx"))) for atom in made.GetAtoms()]
    for atom in made.GetAtoms():
        atom.SetAtomMapNum(0)
    written = [(*_written(molecule), which) for which, molecule in enumerate(reactants)]
    left = sorted([*written, *((*_written(Chem.MolFromSmiles(smiles)), -1) for smiles in reagents.split("."))])
    text, order = _written(made)
    smiles = ".".join(one for one, *_ in left) + ">>" + text
    tokens = ["[CLS]", *TOKEN.findall(smiles), "[SEP]"]
    atoms = [place for place, token in enumerate(tokens[1:-1], 1) if ATOM.fullmatch(token)]
    places = iter(atoms)
    by_rank = dict[tuple[int, int], set[int]]()  # atoms of a molecule that symmetry makes equal have one rank
    ranks = [[*Chem.CanonicalRankAtoms(molecule, breakTies=False)] for molecule in reactants]
    for _, written_order, which in left:
        for atom in written_order:
            place = next(places)
            if which >= 0:
                by_rank.setdefault((which, ranks[which][atom]), set()).add(place)
    truth = {}
    for atom in order:
        which, source = origins[atom]
        truth[next(places)] = frozenset(by_rank[which, ranks[which][source]])
    return Reaction(number, kind, tokens, [place for place in atoms if place not in truth], truth)


def _written(molecule: Any) -> tuple[str, list[int]]:
    """The SMILES of a molecule, and the numbers of its atoms in that order."""
    from rdkit import Chem

    text = Chem.MolToSmiles(molecule)
    return text, [*molecule.GetPropsAsDict(True, True)["_smilesAtomOutputOrder"]]


def chosen(chemist: Chemist, reaction: Reaction) -> list[Row]:
    """The first ATOMS of the product's atoms, in an order at random, that the model knows and that need the reactants: a cut of
    all attention from the product to them costs NEEDED nats."""
    places = [*reaction.truth]
    random.Random(reaction.number).shuffle(places)
    size, arrow = len(reaction.tokens), reaction.arrow
    each = [chemist.inputs(reaction, place) for place in places]
    inputs = {name: torch.cat([one[name] for one in each]) for name in each[0]}  # a sample for each place

    def scores() -> Tensor:
        with torch.no_grad():
            out = chemist.model(**inputs)
        return torch.stack([chemist.score(reaction, place)(out)[number] for number, place in enumerate(places)])

    whole = scores()
    with va.intervene(chemist.model, inputs, va.Knockout(queries=(arrow, size), keys=(0, arrow))):
        falls = whole - scores()
    good = (whole.exp() > KNOWN) & (falls > NEEDED)
    found = [(places[number], float(whole[number]), float(falls[number])) for number in good.nonzero()[:ATOMS, 0].tolist()]
    return [{"place": place, "log_probability": round(known, 4), "fall": round(fall, 4)} for place, known, fall in found]


def methods() -> dict[str, va.methods.Method]:
    """Those of photos, and `weighted` without sinks: defaults first, and the slow ones last."""
    listed = [*measures.methods().values(), va.methods.Weighted(sinks="remove")]
    return {one.label: one for one in sorted(listed, key=lambda one: (one.name in SLOW, one.label != one.name))}


def map_row(chemist: Chemist, reaction: Reaction, atoms: Sequence[Row], method: va.methods.Method) -> Row:
    """For each explained atom: whether the largest entry on the reactants' atoms lies on the right one; the same among all other
    tokens; and the right one's share of the positive part on atoms."""
    columns: Row = {"pointing": [], "among tokens": [], "mass": []}
    for atom in atoms:
        place, sources = atom["place"], torch.tensor(reaction.sources)
        inputs, right = chemist.inputs(reaction, place), reaction.truth[place]
        explained = measures.explain(chemist.model, inputs, method, place, target=chemist.score(reaction, place))
        values = next(iter(explained.relevancy.values()))[0].double()
        positive, others = values.clamp(min=0), values.clone()
        others[place] = -torch.inf
        columns["pointing"].append(int(int(sources[values[sources].argmax()]) in right))
        columns["among tokens"].append(int(int(others.argmax()) in right))
        columns["mass"].append(round(float(positive[[*right]].sum() / positive[sources].sum().clamp(min=1e-300)), 4))
    return {"task": "reaction maps", "number": reaction.number, "method": method.label, **columns}


def atoms_row(chemist: Chemist, reaction: Reaction) -> Row:
    """The explained atoms, and the share of the reactants' atoms that is right for each."""
    atoms = chosen(chemist, reaction)
    chance = [round(len(reaction.truth[atom["place"]]) / len(reaction.sources), 4) for atom in atoms]
    facts = {"number": reaction.number, "kind": reaction.kind, "smiles": "".join(reaction.tokens[1:-1])}
    return {"task": "reaction", **facts, "atoms": atoms, "chance": chance}


def grounding(chemist: Chemist, reaction: Reaction, place: int, token: str) -> Row:
    """The numbers of `va.token_grounding` for a masked atom; `gain` is less the log-probability without attention to the
    reactants, and the map is over their atoms."""
    inputs, number = chemist.inputs(reaction, place), chemist.words[token]
    cut = va.Knockout(queries=(reaction.arrow, len(reaction.tokens)), keys=(0, reaction.arrow))
    with torch.no_grad():
        known = chemist.model(**inputs).logits[0, place].double().log_softmax(-1)
        with va.intervene(chemist.model, inputs, cut):
            alone = chemist.model(**inputs).logits[0, place].double().log_softmax(-1)
    explained = va.explain(
        chemist.model, inputs, target=lambda out: out.logits[:, place].log_softmax(-1)[:, number], position=place
    )
    on_sources = next(iter(explained.relevancy.values()))[0][torch.tensor(reaction.sources)]
    facts = {
        **{"log_probability": float(known[number]), "gain": float(known[number] - alone[number])},
        **{"entropy": float(torch.special.entr(known.exp()).sum()), "compactness": map_numbers([on_sources[None]])[0]},
    }
    return {name: round(value, 6) for name, value in facts.items()}


def grounding_row(chemist: Chemist, reaction: Reaction, place: int, other: Reaction) -> Row:
    """A masked atom with its reactants; the most probable wrong atom in its place; and the right one with the reactants of
    another reaction."""
    right, shift = reaction.tokens[place], other.arrow - reaction.arrow
    with torch.no_grad():
        logits = chemist.model(**chemist.inputs(reaction, place)).logits[0, place]
    wrong = max((token for token in OTHERS if token != right), key=lambda token: float(logits[chemist.words[token]]))
    tokens = [*other.tokens[: other.arrow], *reaction.tokens[reaction.arrow :]]
    swapped = Reaction(reaction.number, reaction.kind, tokens, other.sources, {})
    return {
        **{"task": "reaction grounding", "number": reaction.number, "right": grounding(chemist, reaction, place, right)},
        "wrong atom": grounding(chemist, reaction, place, wrong),
        "other reactants": grounding(chemist, swapped, place + shift, right),
    }


def rows(chemist: Chemist, kept: Kept, listed: Sequence[Reaction]) -> Iterator[Row]:
    """All rows that are kept or measured before the time is over, rule by rule; progress goes to stderr."""
    with_atoms = list[tuple[Reaction, list[Row]]]()
    for reaction in listed:
        for row in kept.get(f"reaction {reaction.number}", partial(atoms_row, chemist, reaction)):
            yield row
            with_atoms += [(reaction, row["atoms"])] if row["atoms"] else []
    for label, method in methods().items():
        for reaction, atoms in with_atoms:
            yield from kept.get(f"{label}: reaction {reaction.number}", partial(map_row, chemist, reaction, atoms, method))
    for n, (reaction, atoms) in enumerate(with_atoms):
        other, _ = with_atoms[(n + len(with_atoms) // 2) % len(with_atoms)]  # most often of another kind
        measured = partial(grounding_row, chemist, reaction, atoms[0]["place"], other)
        yield from kept.get(f"grounding: reaction {reaction.number}", measured)
    yield {"task": "reaction time", "seconds": round(kept.seconds, 1)}
