# ruff: noqa: SIM905  (a row of words reads better than a quoted list)
"""Polish words in their cases and with their numbers: as much grammar as sample_documents.py needs."""

from typing import NamedTuple

# Genders: m = thing with genitive -a, mu = thing with genitive -u, ma = man or animal (accusative = genitive),
# f = feminine, n = neuter, p = plural-only name of a place (Lipowice).
# What a past tense, an adjective after k or g, and an adjective end in when they agree with it: był-a, polsk-a, now-a.
MASCULINE = {"a": "", "i": "i", "y": "y"}
AGREEMENT = {
    "m": MASCULINE,
    "mu": MASCULINE,
    "ma": MASCULINE,
    "f": {"a": "a", "i": "a", "y": "a"},
    "n": {"a": "o", "i": "ie", "y": "e"},
    "p": {"a": "y", "i": "ie", "y": "e"},
}
# Endings of adjectives, in the order of the cases below. After k and g: -i instead of -y, -ie instead of -e.
ADJECTIVE_ENDINGS = {
    "m": "y ego emu y ym ym".split(),
    "mu": "y ego emu y ym ym".split(),
    "ma": "y ego emu ego ym ym".split(),
    "f": "a ej ej ą ą ej".split(),
    "n": "e ego emu e ym ym".split(),
    "p": "e ych ym e ymi ych".split(),
}
# The locative -e changes the consonant before it: Piast, o Piaście; rzeka, w rzece. Any other consonant takes -ie.
BEFORE_E = {"sł": "śle", "st": "ście", "zd": "ździe", "sn": "śnie", "zn": "źnie", "ch": "sze"}
BEFORE_E |= {"t": "cie", "d": "dzie", "r": "rze", "ł": "le", "k": "ce", "g": "dze"}
# A suffix with -i changes the consonant before it: Brod-zice; after sz, ż, cz, rz it becomes -y: Starz-yce.
BEFORE_I = {"sł": "śl", "st": "śc", "sn": "śn", "sk": "szcz", "ch": "sz"}
BEFORE_I |= {"d": "dz", "t": "c", "r": "rz", "ł": "l", "k": "cz", "g": "ż"}
HUSHING = ("sz", "ż", "cz", "rz")
SOFT = (*HUSHING, "c", "dz", "j", "l")
FLEETING = (("ów", "ow"), ("niec", "ńc"), ("iec", "c"), ("ec", "c"), ("ek", "k"), ("ń", "ni"))  # Lipowiec, Lipowca
IRREGULAR = {
    "wieś": "wieś wsi wsi wieś wsią wsi",
    "miasto": "miasto miasta miastu miasto miastem mieście",
    "powieść": "powieść powieści powieści powieść powieścią powieści",
    "książę": "książę księcia księciu księcia księciem księciu",
    "Piotr": "Piotr Piotra Piotrowi Piotra Piotrem Piotrze",
    "Paweł": "Paweł Pawła Pawłowi Pawła Pawłem Pawle",
}


class Noun(NamedTuple):
    """A noun or name in its cases; `adj` is the stem of its adjective (lipowsk-), `last` and `job` are a person's."""

    nom: str
    gen: str
    dat: str
    acc: str
    ins: str
    loc: str
    gender: str
    adj: str = ""
    last: "Noun | None" = None
    job: "Noun | None" = None

    a = property(lambda self: AGREEMENT[self.gender]["a"])
    i = property(lambda self: AGREEMENT[self.gender]["i"])
    y = property(lambda self: AGREEMENT[self.gender]["y"])


def before_e(stem: str) -> str:
    """The stem with the ending -e of the locative (and of the feminine dative)."""
    for size in (2, 1):
        if stem[-size:] in BEFORE_E:
            return stem[:-size] + BEFORE_E[stem[-size:]]
    return stem + "ie"


def attach(root: str, suffix: str) -> str:
    """Joins a root and a suffix the way Polish does: lip + iński, star + yński, olsz + ewo."""
    if suffix.startswith("ow") and root.endswith(HUSHING):
        return root + "e" + suffix[1:]
    if not suffix.startswith("i"):
        return root + suffix
    for size in (2, 1):
        if root[-size:] in BEFORE_I:
            root = root[:-size] + BEFORE_I[root[-size:]]
            break
    if root.endswith(HUSHING):
        suffix = suffix[1:] if suffix[1] in "aeo" else "y" + suffix[1:]
    return root + suffix


def adjective(stem: str, gender: str) -> list[str]:
    """The six cases of a hard adjective: adjective("now", "f") = nowa, nowej, nowej, nową, nową, nowej."""
    velar = {"y": "i", "e": "ie"} if stem[-1] in "kg" else {}
    return [stem + velar.get(ending[0], ending[0]) + ending[1:] for ending in ADJECTIVE_ENDINGS[gender]]


def decline(word: str, gender: str, adj: str = "") -> Noun:
    """Declines a noun from its nominative; surnames in -ski and -cki follow the adjectives."""
    if word in IRREGULAR:
        return Noun(*IRREGULAR[word].split(), gender, adj)
    if word.endswith(("ski", "cki", "ska", "cka")) and word[0].isupper() and gender in ("ma", "f"):
        return Noun(*adjective(word[:-1], gender), gender, adj)
    stem = word[:-1]
    velar = stem[-1] in "kg"
    if gender == "f":
        if stem[-1] == "i":  # Zofia, Zofii, but Kania, Kani
            gen = loc = stem + "i" * word.endswith(("ria", "lia", "fia"))
        elif stem.endswith(SOFT):
            gen = loc = stem + ("i" if stem[-1] in "jl" else "y")
        else:
            gen, loc = stem + ("i" if velar else "y"), before_e(stem)
        return Noun(word, gen, loc, stem + "ę", stem + "ą", loc, gender, adj)
    if gender == "p":
        gen = word[:-2] + "ek" if word.endswith("ki") else stem
        return Noun(word, gen, stem + "om", word, stem + "ami", stem + "ach", gender, adj)
    if gender == "n":
        loc = stem + "u" if velar or stem[-1] == "i" or stem.endswith(SOFT) else before_e(stem)
        return Noun(word, stem + "a", stem + "u", word, stem + ("iem" if velar else "em"), loc, gender, adj)
    stem = next((word[: -len(old)] + new for old, new in FLEETING if word.endswith(old)), word)
    gen = stem + ("u" if gender == "mu" else "a")
    ins = stem + ("iem" if stem[-1] in "kg" else "em")
    loc = stem + "u" if stem[-1] in "kgi" or stem.endswith((*SOFT, "ch")) else before_e(stem)
    return Noun(word, gen, stem + "owi", gen if gender == "ma" else word, ins, loc, gender, adj)


def phrase(noun: Noun, stem: str, adjective_first: bool = False) -> Noun:
    """A noun with an adjective that agrees with it: zupa lipowska, Nowe Lipowice."""
    pairs = zip(noun[:6], adjective(stem, noun.gender), strict=True)
    cases = [f"{b} {a}" if adjective_first else f"{a} {b}" for a, b in pairs]
    return noun._replace(**dict(zip(Noun._fields, cases, strict=False)))


def extend(noun: Noun, text: str) -> Noun:
    """A noun followed by words that stay the same in every case: bitwy pod Lipowem."""
    return Noun(*(case + text for case in noun[:6]), *noun[6:])


def plural(number: int, one: str, few: str, many: str) -> str:
    """The form a noun takes after a number: 1 rok, 2 lata, 5 lat, 12 lat, 21 lat, 22 lata."""
    if number == 1:
        return one
    return few if 2 <= number % 10 <= 4 and not 12 <= number % 100 <= 14 else many


ROMAN = "0 I II III IV V VI VII VIII IX X XI XII XIII XIV XV XVI XVII XVIII XIX XX XXI".split()
MONTHS = "stycznia lutego marca kwietnia maja czerwca lipca sierpnia września października listopada grudnia".split()
UNITS = """rok lata lat, dzień dni dni, godzinę godziny godzin, osobę osoby osób, mieszkańca mieszkańców mieszkańców,
kilometr kilometry kilometrów, metr metry metrów, centymetr centymetry centymetrów, milimetr milimetry milimetrów,
dom domy domów, młyn młyny młynów, most mosty mostów, jajo jaja jaj, plamę plamy plam, osobnika osobniki osobników,
żołnierza żołnierzy żołnierzy, punkt punkty punktów, mecz mecze meczów, zwycięstwo zwycięstwa zwycięstw,
remis remisy remisów, miejsce miejsca miejsc, dziecko dzieci dzieci, stronę strony stron, język języki języków,
list listy listów, fotografię fotografie fotografii, gram gramy gramów"""
FORMS = {forms.split()[2]: forms.split() for forms in UNITS.split(",")}  # by the form after 5, in the accusative


class Number(int):
    """A whole number; as `f"{n:lat}"` with its noun, as `f"{n:wiek}"` the Roman number of the year's century."""

    def __format__(self, unit: str) -> str:
        if unit == "wiek":
            return ROMAN[(self + 99) // 100]
        digits = f"{int(self):,}".replace(",", " ") if self >= 10_000 else str(int(self))  # four digits stay together
        return f"{digits} {plural(self, *FORMS[unit])}" if unit else digits


class Decimal(float):
    """A fraction, printed with the Polish decimal comma."""

    def __format__(self, unit: str) -> str:
        return str(float(self)).replace(".", ",")


class Day(NamedTuple):
    """A date that compares by time and prints as 12 marca 1902."""

    year: int
    month: int
    day: int

    def __str__(self) -> str:
        return f"{self.day} {MONTHS[self.month - 1]} {self.year}"
