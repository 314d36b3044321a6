# ruff: noqa: RUF001, SIM905  (Polish uses en dashes on purpose; a row of words reads better than a quoted list)
"""Generates Polish, encyclopedia-like articles for training runs without a network or a download.

THIS IS NOT WIKIPEDIA. Every town, person, species, date and number is invented by the generator below; nothing was
copied from a corpus, and a loss measured on these documents must be reported as measured on generated text.

What makes it worth learning from: names are built from roots and suffixes and then declined, so new word forms never
run out, and a fact invented once is remembered for the rest of its document (a town in six cases, "zmarł w wieku 54
lat" = death - birth, density = population / area), so a longer context lowers the loss. When it does not help:
templates are far more regular than human writing, so losses are lower than on a real corpus and not comparable.

    python sample_documents.py                          # three documents and a line of statistics
    next(generate_documents(1, seed=7))                 # one article as a string

How a sentence is made: "W {charter} roku {ruler.nom} nadał {self.dat} prawo targu." names its facts as {slots};
`Facts` invents a slot when a sentence first asks for it. "{town2.loc}" is a second town in the locative, "{reign:lat}"
a number with its noun (1 rok, 2 lata, 5 lat), "{war:wiek}" a Roman century, "{3-40}" a number used once, "{born+6-15}"
one counted from another fact, "{new_person.nom}" somebody forgotten after the sentence, "[a|b]" a choice of wording.
"""

import math
import re
import time
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from itertools import product
from random import Random
from typing import NamedTuple

# --- Inflection -------------------------------------------------------------------------------------------------------

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


# --- Words ------------------------------------------------------------------------------------------------------------

# A name is a root and an ending: a word root, two halves of an old Slavic name, or made-up syllables.
ROOTS = """lip brzez dęb olsz buk sosn wierzb jabłon kalin jawor grab klon jesion topol malin bor lask gor kamion krzem
mokr such star now biał czarn zielon krasn złot srebr sol bobr wilk lis żuraw bocian tur prus maz grod pust""".split()
FIRST = "dobro rado stani bogu wito miło wsze jaro święto miro gniewo krzesi lubo mści siemi tomi wielo domo".split()
SECOND = "sław mir gost bor wit rad dar mysł woj bud mił chwał bysz".split()
SLAVIC_ROOTS = [first + second for first in FIRST for second in SECOND if first[:3] != second]
ONSETS = "b br dr d gr gl kr kl ł m n p pl pr r s sk st t tr w z zb krz prz strz cz św".split()
VOWELS = "a o e u".split()
LONG_VOWELS = [a + middle + b for a in VOWELS for middle in "lnrmtdw" for b in "aoe"]
CODAS = "l n m w b s z r d t ż sz lb rn rm lm nd rt mb".split()
# Endings of town names with their gender and the ending of the adjective: Lipów, lipowski.
TOWN_ENDINGS = """ów m owsk, owo n owsk, owice p owick, ice p ick, in m ińsk, ińsk m ińsk, ówka f owieck,
owiec m owieck, anów m anowsk, any p ańsk, iczki p ick, owina f owińsk"""
TOWN_ENDINGS = [ending.split() for ending in TOWN_ENDINGS.split(",")]
RIVER_ENDINGS = "awa ica ianka ówka inka owa icza anka".split()
SURNAME_ENDINGS = "owski iński icki owicz ak ik owczyk iecki ański owiak".split()
MEN = """Adam Jan Stefan Roman Marian Zenon Kazimierz Tadeusz Mateusz Zygmunt Edward Piotr Ludwik Henryk Józef Karol
Michał Feliks Tomasz Wojciech Andrzej Marek Franciszek Paweł Leon Konrad Witold Seweryn Hubert""".split()
WOMEN = """Anna Maria Julia Zofia Halina Helena Jadwiga Barbara Agnieszka Elżbieta Wanda Urszula Krystyna Teresa
Kazimiera Stanisława Róża Kinga Danuta Aniela Katarzyna Marta Ewa Irena Joanna Łucja Weronika""".split()
RULERS = (
    "Bolesław Kazimierz Zygmunt Ludwik Henryk Konrad Przemysław Mirosław Radosław Świętosław Dobromir Witold".split()
)
JOBS = """pisarz pisarka, malarz malarka, lekarz lekarka, nauczyciel nauczycielka, botanik botaniczka,
kompozytor kompozytorka, fotograf fotografka, tłumacz tłumaczka, historyk historyczka, astronom astronomka,
chemik chemiczka, etnograf etnografka, kartograf kartografka, geolog geolożka, aptekarz aptekarka"""
MEN, WOMEN, RULERS = [[decline(n, g) for n in names] for names, g in ((MEN, "ma"), (WOMEN, "f"), (RULERS, "ma"))]
JOBS = [(decline(man, "ma"), decline(woman, "f")) for man, woman in (pair.split() for pair in JOBS.split(","))]

# Slots that are a choice of words; a word followed by /gender is declined.
WORDS = """
region: mazowieck|podlask|lubelsk|śląsk|pomorsk|łódzk|małopolsk|wielkopolsk|opolsk|podkarpack|lubusk|świętokrzysk
side: północ|południe|wschód|zachód
town_word: Now|Star|Wielk|Mał|Górn|Doln
animal_noun: nik/ma|ówka/f|niczka/f|ak/ma|inka/f|owiec/ma
animal_adj: głow|brzuch|grzbiet|ok|ogonow|plamist|bok|nog|gardł
color: czarno|biało|rudo|złoto|srebrno|żółto|modro|szaro|zielono|czerwono|jasno|ciemno
plant_noun: dzwonek/m|turzyca/f|mięta/f|fiołek/m|storczyk/m|wierzba/f|róża/f|ostnica/f|bodziszek/m|goździk/m|\
lilia/f|pierwiosnek/m|krwawnik/m|koniczyna/f|wyka/f|groszek/m|jastrzębiec/m|babka/f|kostrzewa/f
plant_adj: drobnolistn|wąskolistn|białokwiatow|górsk|błotn|skaln|leśn|piaskow|nadrzeczn|szerokolistn|wonn|kosmat
habitat: torfowiskach|wrzosowiskach|podmokłych łąkach|śródleśnych polanach|skalnych zboczach|brzegach jezior|miedzach
hill: Góra/f|Skała/f|Wierch/mu|Szczyt/mu|Grzbiet/mu|Kopa/f|Wzgórze/n|Czuba/f
nickname: Rud|Śmiał|Łys|Pobożn|Czarn|Star|Mał|Wielk|Cich|Okrutn|Hojn|Such|Kulaw|Mężn
team: Górnik/ma|Iskra/f|Tęcza/f|Kolejarz/ma|Hutnik/ma|Strażak/ma|Sparta/f|Wisła/f|Warta/f|Błyskawica/f|Piast/ma|Gryf/ma
title_head: Cień|Dom|Głos|Sen|Powrót|Ogród|Zegar|Lato|Most|Pamięć|Tajemnica|Córka|Milczenie|Śnieg|Pieśń|Światło|Droga
title_tail: wiatru|popiołu|zegarmistrza|morza|mgły|żniwiarza|ostatniej zimy|kamieni|młynarza|samotnej wyspy|północy|soli
month_loc: styczniu|lutym|marcu|kwietniu|maju|czerwcu|lipcu|sierpniu|wrześniu|październiku|listopadzie|grudniu
food: owadami|ślimakami|nasionami traw|wodnymi larwami|jagodami|dżdżownicami
"""
WORDS = {name: words.split("|") for name, words in (line.split(": ") for line in WORDS.strip().split("\n"))}
WORDS = {name: [decline(*w.split("/")) if "/" in w else w for w in words] for name, words in WORDS.items()}

# Slots that are numbers: a range, a range after another fact, or a sum of facts.
NUMBERS = """height 90-420, distance 6-48, census 2003-2021, women 48-54, founded 1105-1290, charter founded+40-130,
fire charter+60-220, rebuild 2-9, rebuilt fire+rebuild, railway 1848-1912, factory railway+1-25,
born 1780-1900, school born+9-16, school_age school-born, debut born+19-31, debut_age debut-born, wedding born+22-34,
award debut+3-9, jubilee born+100-100, length 6-70, described 1796-1930,
stream 14-190, mouth 8-90, drop 30-400, source mouth+drop, opened 1850-1912,
peak 480-1900, below 40-260, saddle peak-below, hut 1876-1930,
published 1885-1950, writing 2-9, begun published-writing, story 1790-1860,
war 1110-1420, prior 2-6, invaded war-prior, truce 1-4, peace war+truce, enemies 900-6000, surplus 200-3000,
forces enemies+surplus, throne_born 1010-1330, crowned throne_born+17-38, crowned_age crowned-throne_born, reign 5-41,
throne_died crowned+reign, throne_age throne_died-throne_born, hardness 2,0-8,5, specific 2,1-7,8,
started 1896-1950, season 1956-2018, season_end season+1-1, wins 4-19, draws 2-8, losses 2-12,
played wins+draws+losses, points wins+wins+wins+draws, seats 400-9000"""
NUMBERS = dict(pair.split() for pair in re.split(r",\s", NUMBERS))
RANGE = re.compile(r"(?:(\w+)\+)?(\d+(?:,\d)?)-(\d+(?:,\d)?)")

# --- Facts ------------------------------------------------------------------------------------------------------------


class Facts(dict):
    """What one document has said so far: a slot is invented when first asked for and stays true afterwards."""

    def __init__(self, rng: Random):
        super().__init__()
        self.rng = rng
        self.random = rng.random
        self.passing: list[str] = []

    def __missing__(self, slot: str):
        value = recipe(slot)(self)
        if "-" not in slot:  # an inline range is a new number each time
            self[slot] = value
            if slot.startswith("new_"):
                self.passing.append(slot)
        return value

    def pick(self, options: list):
        return options[int(self.random() * len(options))]

    def sentence(self, wordings: list[str]) -> str:
        """One of the wordings with its slots filled in; the slots named new_... are forgotten again."""
        text = wordings[int(self.random() * len(wordings))].format_map(self)
        while self.passing:
            del self[self.passing.pop()]
        return text[0].upper() + text[1:]


@cache
def recipe(slot: str) -> Callable[[Facts], object]:
    """The function that invents a slot: an inline range, a formula of NUMBERS, a maker, or a choice from WORDS."""
    name = slot.removeprefix("new_").rstrip("0123456789")
    formula = NUMBERS.get(name, slot)
    if found := RANGE.fullmatch(formula):
        base, low, high = found.groups()
        if "," in low:
            low, high = (float(edge.replace(",", ".")) for edge in (low, high))
            return lambda facts: Decimal(round(facts.rng.uniform(low, high), 1))
        low, span = int(low), int(high) - int(low) + 1
        return lambda facts: Number((facts[base] if base else 0) + low + int(facts.random() * span))
    if name in NUMBERS:
        terms = [(-1 if sign == "-" else 1, term) for sign, term in re.findall(r"([+-]?)(\w+)", formula)]
        return lambda facts: Number(sum(sign * facts[term] for sign, term in terms))
    return MAKERS[name] if name in MAKERS else lambda facts: facts.pick(WORDS[name])


def root(facts: Facts) -> str:
    chance = facts.random()
    if chance < 0.3:
        return facts.pick(ROOTS)
    if chance < 0.6:
        return facts.pick(SLAVIC_ROOTS)
    return facts.pick(ONSETS) + facts.pick(VOWELS if chance < 0.8 else LONG_VOWELS) + facts.pick(CODAS)


def latin(facts: Facts) -> str:
    """A two-part scientific name: Kralbella dobromirensis."""
    genus, species = (root(facts).translate(str.maketrans("ąćęłńóśźż", "aceln" + "oszz")) for _ in range(2))
    return (
        genus.capitalize()
        + facts.pick(["ella", "odes", "ia", "ophora"])
        + " "
        + species
        + facts.pick(["ensis", "icola"])
    )


@lru_cache(20_000)
def town_name(stem: str, ending: str, gender: str, adj: str) -> Noun:
    return decline(attach(stem, ending).capitalize(), gender, attach(stem, adj))


def town(facts: Facts) -> Noun:
    noun = town_name(root(facts), *facts.pick(TOWN_ENDINGS))
    return phrase(noun, facts.pick(WORDS["town_word"]), adjective_first=True) if facts.random() < 0.15 else noun


def river(facts: Facts) -> Noun:
    return decline(attach(root(facts), facts.pick(RIVER_ENDINGS)).capitalize(), "f")


@lru_cache(20_000)
def surname(stem: str, ending: str, woman: bool) -> Noun:
    name = attach(stem, ending).capitalize()
    if not woman:
        return decline(name, "ma")
    # Anna Lipowska, o Annie Lipowskiej, but Anna Lipowicz, o Annie Lipowicz
    return decline(name[:-1] + "a", "f") if name.endswith("i") else Noun(*[name] * 6, "f")


def person(facts: Facts, woman: bool | None = None) -> Noun:
    woman = facts.random() < 0.45 if woman is None else woman
    first, last = facts.pick(WOMEN if woman else MEN), surname(root(facts), facts.pick(SURNAME_ENDINGS), woman)
    names = [f"{a} {b}" for a, b in zip(first[:6], last[:6], strict=True)]
    return Noun(*names, last.gender, "", last, facts.pick(JOBS)[woman])


def ruler(facts: Facts) -> Noun:
    first = facts.pick(RULERS)
    full = extend(first, facts.pick(["", " I", " II", " III", " IV"]))
    return phrase(full, facts.pick(WORDS["nickname"]))


def title(facts: Facts) -> str:
    if facts.random() < 0.5:
        return f"{facts.pick(WORDS['title_head'])} {facts.pick(WORDS['title_tail'])}"
    patterns = [
        "Listy z {gen}",
        "Lato w {loc}",
        "Droga do {gen}",
        "Noc pod {ins}",
        "Pożegnanie z {ins}",
        "Ballada o {loc}",
    ]
    return facts.pick(patterns).format_map(town(facts)._asdict())


def animal(facts: Facts) -> Noun:
    ending = facts.pick(WORDS["animal_noun"])
    noun = decline(attach(root(facts), ending.nom), ending.gender)
    return phrase(noun, facts.pick(WORDS["color"]) + facts.pick(WORDS["animal_adj"]))


def day(facts: Facts, year: int) -> Day:
    return Day(year, 1 + int(facts.random() * 12), 1 + int(facts.random() * 28))


def population(facts: Facts) -> Number:
    low, high = {"miasto": (9_000, 90_000), "miasteczko": (1_500, 9_000)}.get(facts["it"].nom, (80, 1_500))
    return Number(math.exp(facts.rng.uniform(math.log(low), math.log(high))))


def area(facts: Facts) -> Decimal:
    people = facts["population"]
    return Decimal(round(people / (30 + people * facts.rng.uniform(0.01, 0.04)), 2))


def age(facts: Facts) -> Number:
    birth, death = facts["birth"], facts["death"]
    return Number(death.year - birth.year - (death[1:] < birth[1:]))


MAKERS = {
    **dict.fromkeys(("person", "scholar", "critic", "author", "founder", "friend", "hero", "trainer"), person),
    "man": lambda facts: person(facts, woman=False),
    "spouse": lambda facts: person(facts, woman=facts["self"].gender == "ma"),
    "princess": lambda facts: facts.pick(WOMEN),
    **{maker.__name__: maker for maker in (root, latin, town, river, ruler, title, animal, area, age)},
    "epithet": lambda facts: latin(facts).split()[1],
    "plant": lambda facts: phrase(
        facts.pick(WORDS["plant_noun"]),
        facts.pick(WORDS["plant_adj"]) if facts.random() < 0.5 else town(facts).adj,
    ),
    "mountain": lambda facts: phrase(
        facts.pick(WORDS["hill"]), (root(facts) + "ow").capitalize(), adjective_first=True
    ),
    "range": lambda facts: town(facts).adj.capitalize(),
    "mineral": lambda facts: decline(attach(root(facts), "it"), "mu"),
    "book": lambda facts: extend(facts["it"], f" „{facts['title']}”"),
    "battle": lambda facts: extend(decline("bitwa", "f"), f" pod {facts['town'].ins}"),
    "club": lambda facts: extend(facts.pick(WORDS["team"]), f" {facts['town'].nom}"),
    "population": population,
    "former_population": lambda facts: Number(facts["population"] * facts.rng.uniform(0.6, 1.1)),
    "density": lambda facts: Number(round(facts["population"] / facts["area"])),
    "birth": lambda facts: day(facts, facts["born"]),
    "death": lambda facts: day(facts, facts["born"] + 50 + int(facts.random() * 42)),
    "died": lambda facts: Number(facts["death"].year),
    "mass": lambda facts: Number(4 + facts["length"] ** 2 * facts.rng.uniform(0.2, 0.6)),
    "fought": lambda facts: day(facts, facts["war"]),
    "weight": lambda facts: Number(round(facts["specific"] * 10)),
    "founding": lambda facts: day(facts, facts["started"]),
}

# --- Articles ---------------------------------------------------------------------------------------------------------

# One block a kind: "@ maker of its subject, its noun", "> opening", sentences of sections in the order they may appear,
# "* list item", "~ closing categories"; "+" continues the line above. {self} is the subject, {it} its noun; the last
# block serves every kind.
ARTICLES = """
@ town miasto/n|miasteczko/n|wieś/f|osada/f
> {self.nom} – {it.nom} w Polsce, [położon{it.y}|leżąc{it.y}] w województwie {region}im, w powiecie {self.adj}im.
> {self.nom} – {it.nom} nad {river.ins} w województwie {region}im, w odległości {distance} km od {town2.gen}.
= Położenie
{it.nom} zajmuje {area} km² i leży na wysokości {height} m n.p.m., {distance:kilometrów} na {side} od {town2.gen}.
[Przez {self.acc} przepływa|Wzdłuż granic {self.gen} płynie] {river.nom}, która koło {town3.gen} wpada do {river2.gen}.
Najwyższym wzniesieniem okolicy jest {mountain.nom} ({height+30-260} m n.p.m.), widoczn{mountain.y} znad {river.gen}.
= Ludność
W {census} roku {it.nom} liczył{it.a} {population:mieszkańców}, a gęstość zaludnienia wynosiła {density:osób} na km².
+ Kobiety stanowiły wówczas {women}% ludności {self.gen}, a średni wiek wynosił {36-47:lat}.
= Historia
Pierwsza wzmianka o {self.loc} pochodzi z {founded} roku i dotyczy [sporu o młyn|darowizny dla klasztoru|cła mostowego].
W {charter} roku {ruler.nom} nadał {self.dat} [prawo targu|przywilej na dwa jarmarki rocznie|prawo poboru mostowego].
W {fire} roku pożar zniszczył {it.acc}; odbudowa trwała {rebuild:lat} i zakończyła się w {rebuilt} roku.
W {railway} roku {self.acc} połączyła z {town2.ins} linia kolejowa o długości {distance} km.
W {factory} roku {founder.nom} z {town3.gen} założył{founder.a} w {self.loc} [cegielnię|mleczarnię|garbarnię|tkalnię].
= Gospodarka
Zakład, który w {factory} roku otworzył{founder.a} {founder.nom}, działa do dziś i zatrudnia {60-900:osób}.
Ulica {founder.gen} prowadzi od dworca nad {river.acc}, [gdzie co roku odbywa się jarmark|gdzie stoi dawny młyn].
= Liczba mieszkańców
* {1900-2020} – {new_former_population:mieszkańców}
= Ludzie związani z {self.ins}
* {new_person.nom} ({new_born}–{new_born+31-88}) – {new_person.job.nom}
~ Miejscowości w województwie {region}im; Powiat {self.adj}i; Miejscowości nad {river.ins}
@ person -
> {self.nom} (ur. {birth} w {town.loc}, zm. {death} w {town2.loc}) – polsk{self.i} {it.nom}.
> {self.nom} (ur. {birth}, zm. {death}) – {it.nom} związan{self.y} z {town.ins} i {town2.ins}.
= Życiorys
Urodził{self.a} się w rodzinie [kowala|nauczyciela|kupca|młynarza] z {town.gen} jako [jedyne|drugie|trzecie] dziecko.
Dzieciństwo spędził{self.a} w {town.loc} nad {river.ins},
+ [dokąd często wracał{self.a}|o której nieraz pisał{self.a} w listach].
W {school} roku, mając {school_age:lat}, wyjechał{self.a} do {town3.gen}, by uczyć się [rysunku|języków|muzyki].
+ [Uczył{self.a} się tam|Pierwsze lekcje pobierał{self.a}] u {friend.gen}, {friend.job.gen} z {town4.gen}.
W {wedding} roku poślubił{self.a} {spouse.acc}; małżeństwo miało {2-6:dzieci}.
Przez {4-22:lat} mieszkał{self.a} w {town2.loc}, w domu nad {river2.ins}.
Zmarł{self.a} w wieku {age} lat [po krótkiej chorobie|na zapalenie płuc|podczas podróży]
+ i spoczywa na cmentarzu w {town2.loc}.
= Działalność
Pierwsza książka {self.gen}, „{title}”, ukazała się w {debut} roku, gdy {self.last.nom} miał{self.a} {debut_age:lat}.
Za najważniejszą pracę {self.last.gen} uchodzi „{title2}”, nad którą pracował{self.a} {3-9:lat}.
Współpracował{self.a} z {friend.ins}; [w ich listach zachowało się|z tych lat pochodzi] wiele [szkiców|notatek].
+ {friend.last.nom} wspominał{friend.a}, że {self.last.nom} pracował{self.a} [tylko nocą|na stojąco].
W {award} roku otrzymał{self.a} [nagrodę miasta {town2.gen}|Złoty Medal Towarzystwa Naukowego w {town3.loc}].
= Upamiętnienie
Od {died+3-30} roku imię {self.gen} nosi [szkoła|biblioteka|jedna z ulic] w {town.loc}.
W {jubilee} roku, w setną rocznicę urodzin {self.gen}, w {town.loc} odsłonięto pomnik.
= Ważniejsze prace
* {debut+1-17} – „{new_title}”
~ Urodzeni w {born} roku; Zmarli w {died} roku; Ludzie związani z {town.ins}
@ animal gatunek/mu
> {self.nom} (''{latin}'') – gatunek [ptaka|jaszczurki|ryby|płaza|żółwia] z rodziny {root}owatych.
= Wygląd
Dorosłe osobniki mają {length:centymetrów} długości i ważą około {mass} g.
Samice są [nieco większe|wyraźnie mniejsze|jaśniejsze] od samców, a na ich [grzbiecie|głowie|bokach] widać {3-9:plam}.
Od podobnego gatunku, {animal2.gen}, {self.nom} różni się [kształtem głowy|barwą oczu|krótszym ogonem].
= Występowanie
{self.nom} [żyje|występuje] na {habitat} w dorzeczu {river.gen} i {river2.gen}.
Największą populację, liczącą {120-9000:osobników}, stwierdzono w {1961-2012} roku koło {town.gen}.
W okolicach {town2.gen} gatunek wyginął około {1890-1950} roku; powrócił tam znad {river.gen} po {15-60} latach.
= Tryb życia
Samica składa w {month_loc} {2-12:jaj}, z których młode wykluwają się po {9-40} dniach.
[Żywi się|Odżywia się] {food}, a w niewoli dożywa {6-30} lat.
= Nazwa i opis
Gatunek opisał{scholar.a} w {described} roku {scholar.nom}, {scholar.job.nom} z {town3.gen},
+ na podstawie {2-14} okazów znad {river.gen}. Zbiór {scholar.last.gen} przechowuje muzeum w {town3.loc}.
= Podgatunki
* ''{latin} {epithet}'' – [górny|środkowy|dolny] bieg {new_river.gen}
~ Gatunki opisane w {described} roku; Fauna województwa {region}iego
@ plant gatunek/mu
> {self.nom} (''{latin}'') – gatunek rośliny z rodziny {root}owatych, [rosnący|spotykany] na {habitat}.
= Morfologia
Łodyga jest [wzniesiona|pokładająca się|owłosiona] i dorasta do {20-140} cm.
Liście są [lancetowate|jajowate|równowąskie|sercowate], o długości {2,0-9,5} cm.
Kwiaty, [białe|żółte|różowe|fioletowe|niebieskie], mają {4-38:milimetrów} średnicy.
= Biologia
[Kwitnie|Zakwita] [od kwietnia do czerwca|od maja do lipca|w lipcu i sierpniu]; kwiaty zapylają [pszczoły|trzmiele].
Nasiona {self.gen} zachowują zdolność kiełkowania przez {2-9:lat}.
Obok {self.gen} rośnie zwykle {plant2.nom}, [o liściach bardziej owłosionych|o kwiatach dwa razy mniejszych].
= Rozmieszczenie
{self.nom} rośnie w dolinie {river.gen} między {town.ins} a {town2.ins}, rzadziej nad {river2.ins}.
W {1961-2015} roku koło {town.gen} doliczono się {40-9000} osobników {self.gen}.
= Historia i zastosowanie
Z [korzeni|liści|kwiatów] {self.gen} parzono w {town.loc} napar [na kaszel|na sen|na ból głowy].
W {described} roku {scholar.nom} z {town3.gen} opisał{scholar.a} {self.acc} jako nowy gatunek.
+ {scholar.last.nom} uzyskał{scholar.a} z {self.gen} barwnik, którym w {town2.loc} farbowano wełnę.
= Stanowiska
* {new_town.nom} – {3-700:osobników}
~ Gatunki opisane w {described} roku; Flora województwa {region}iego
@ river rzeka/f
> {self.nom} – rzeka w województwie {region}im, [lewy|prawy] dopływ {river2.gen}, o długości {stream} km.
= Przebieg
{self.nom} płynie na {side}, mija {town.acc} i {town2.acc}, a koło {town3.gen} wpada do {river2.gen}.
Źródła {self.gen} znajdują się u stóp {mountain.gen}, na wysokości {source} m n.p.m.
+ Ujście leży na wysokości {mouth} m n.p.m., spadek na całej długości wynosi więc {drop:metrów}.
Największe dopływy {self.gen} to {river3.nom} i {river4.nom}; [pierwsza|druga] z nich płynie przez {town4.acc}.
= Hydrologia
Średni przepływ w {town3.loc} wynosi {0,4-38,0} m³/s, a szerokość koryta – {4-70:metrów}.
Najwyższy stan wody zanotowano w {town2.loc} w {month_loc} {1888-2010} roku.
= Historia
W XVIII wieku na odcinku od {town.gen} do {town2.gen} {self.nom} napędzała {3-17:młynów}.
Powódź z {1813-1903} roku zniszczyła w {town2.loc} {2-6:mostów} i {9-80:domów}.
Most w {town.loc} zaprojektował{founder.a} {founder.nom}; otwarto go w {opened} roku.
= Turystyka
Spływ z {town.gen} do {town3.gen} trwa {2-5:dni}, z noclegiem w {town2.loc}.
= Dopływy
* {new_river.nom} – [lewy|prawy], {3-40} km
~ Rzeki w województwie {region}im; Dorzecze {river2.gen}
@ mountain szczyt/mu
> {self.nom} – szczyt o wysokości {peak} m n.p.m. w Górach {range}ich, w województwie {region}im.
= Topografia
{self.nom} wznosi się między dolinami {river.gen} i {river2.gen}, {distance:kilometrów} na {side} od {town.gen}.
Od {mountain2.gen} oddziela {self.acc} przełęcz ({saddle} m n.p.m.), leżąca {below:metrów} poniżej wierzchołka.
Na północnych stokach {self.gen} ma źródło {river.nom}, która płynie w stronę {town.gen}.
= Przyroda
Szczyt zbudowany jest z [piaskowca|granitu|wapienia|gnejsu];
+ w {described} roku {scholar.nom} odkrył{scholar.a} tu {mineral.acc}.
Zbocza porasta [bór świerkowy|buczyna|kosodrzewina], a na polanach rośnie {plant.nom}.
= Turystyka
Z {town.gen} na {self.acc} prowadzi [czerwony|niebieski|zielony|żółty] szlak; podejście zajmuje {2-6:godzin}.
Schronisko pod {self.ins} zbudowano w {hut} roku według projektu {founder.gen}, {founder.job.gen} z {town.gen}.
+ Spłonęło w {hut+8-40} roku, a po {2-9} latach wzniesiono nowe, z {20-90} miejscami noclegowymi.
Pierwszego zimowego wejścia na {self.acc} dokonał{friend.a} w {described+3-9} roku {friend.nom}.
= Szlaki
* {new_town.nom} – [czerwony|niebieski|zielony|żółty], {2-19} km
~ Szczyty Gór {range}ich; Góry w województwie {region}im
@ book powieść/f
> {self.nom} – [pierwsza|druga|trzecia|ostatnia] książka {author.gen}, wydana w {published} roku w {town.loc}.
= Fabuła
Akcja rozgrywa się w {town2.loc} nad {river.ins} w {story} roku.
{hero.nom}, {hero.job.nom}, wraca po {5-25} latach do {town2.gen}; [dom jest pusty|nikt nie pamięta jego rodziny].
+ W domu nad {river.ins} {hero.last.nom} znajduje [list|dziennik|testament], który zostawił{friend.a} {friend.nom}.
+ {friend.last.nom} [nie mówi {hero.last.dat} całej prawdy|pomaga {hero.last.dat} odnaleźć drogę do {town3.gen}].
Ostatni rozdział opowiada o podróży {hero.gen} z {town2.gen} do {town3.gen}.
= Powstanie
{author.last.nom} pracował{author.a} nad książką {writing:lat}, od {begun} do {published} roku.
Rękopis liczył {310-900:stron}, z których {author.last.nom} skreślił{author.a} {20-150}.
= Odbiór
{critic.nom} pisał{critic.a}, że „{title}” to [książka o pamięci|portret małego miasta|opowieść o winie i przebaczeniu].
Powieść {author.gen} przełożono na {3-30:języków}, a {person5.nom} wyreżyserował{person5.a} w {1958-2015} roku film.
+ W filmie, nakręconym w {town4.loc}, {hero.nom} [ginie w nurtach {river.gen}|nigdy nie wraca do {town2.gen}].
= Wydania
* {1956-2019} – {new_town.nom}, {200-600:stron}
~ Powieści z {published} roku; Książki wydane w {town.loc}
@ battle bitwa/f
> {self.nom} – starcie stoczone {fought} roku między wojskami, którymi dowodzili {ruler.nom} i {ruler2.nom}.
= Tło
Spór dotyczył [ceł pobieranych nad {river.ins}|ziemi {town.adj}iej|spadku po ojcu].
W {invaded} roku, {prior:lat} przed bitwą, {ruler2.nom} zajął {town2.acc} i {town3.acc}.
= Siły
{ruler.nom} przyprowadził pod {town.acc} {forces:żołnierzy}, a {ruler2.nom} – {enemies:żołnierzy}.
+ Przewaga {ruler.gen} wynosiła więc {surplus:żołnierzy}.
= Przebieg
Walkę zaczęła jazda, która o świcie przekroczyła {river.acc} [w bród|po moście|po lodzie].
Po {2-7} godzinach odwód, którym dowodził {man.nom}, zaatakował obóz [nad {river.ins}|od strony {town3.gen}].
+ {man.last.nom} [zginął|został ranny|dostał się do niewoli], zanim nadeszły posiłki z {town4.gen}.
= Skutki
{ruler2.nom} stracił {200-800:żołnierzy} i wycofał się do {town2.gen}.
Pokój zawarto w {town4.loc} w {peace} roku, {truce:lat} po bitwie; {ruler.nom} odzyskał {town3.acc}.
W {war+20-90} roku na polu bitwy zbudowano kaplicę, [którą zniszczył pożar|która stoi do dziś].
= Dowódcy
* {new_man.nom} – [jazda|piechota|łucznicy|odwód|tabory], {90-800:żołnierzy}
~ Bitwy w historii Polski; Konflikty w {war:wiek} wieku; Historia {town.gen}
@ ruler książę/ma
> {self.nom} (ur. {throne_born}, zm. {throne_died}) – książę {town.adj}i od {crowned} roku, następca {ruler2.gen}.
= Panowanie
{self.nom} objął władzę w {crowned} roku, mając {crowned_age:lat}, po śmierci {ruler2.gen}.
W {crowned+1-3} roku pokonał pod {town2.ins} wojska, którymi dowodził {ruler3.nom}.
+ Po bitwie pod {town2.ins} {self.nom} i {ruler3.nom} podzielili się ziemiami nad {river.ins}.
Ufundował klasztor w {town3.loc} i zbudował most na {river.loc}.
Nadał {town4.dat} prawa miejskie, a {town3.acc} otoczył murem o długości {300-1900} m.
Jego panowanie trwało {reign:lat} i zakończyło się w {throne_died} roku.
= Rodzina
Żoną {self.gen} była {princess.nom}, córka {ruler4.gen}; mieli {2-7:dzieci}.
+ {princess.nom} przeżyła męża o {2-20:lat} i zmarła w {town3.loc}.
{self.nom} zmarł w wieku {throne_age} lat; tron w {town.loc} przejął jego [syn|brat|bratanek], {ruler5.nom}.
= Ocena
{scholar.nom} nazwał{scholar.a} go [władcą ostrożnym|dobrym gospodarzem|ostatnim rycerzem na tronie w {town.loc}].
= Dokumenty
* {crowned+1-4} – [przywilej|nadanie|list] dla {new_town.gen}
~ Księstwo {town.adj}ie; Zmarli w {throne_died} roku; Władcy {crowned:wiek} wieku
@ mineral minerał/mu
> {self.nom} – minerał z gromady [krzemianów|węglanów|siarczków|tlenków], odkryty koło {town.gen} w {described} roku.
= Właściwości
Tworzy [igiełkowe|płytkowe] kryształy o barwie [zielonej|miodowej|różowej] i twardości {hardness} w skali Mohsa.
Gęstość {self.gen} wynosi {specific} g/cm³, więc bryłka o objętości 10 cm³ waży około {weight} g.
{self.nom} bywa mylony z {mineral2.ins}, który jest jednak [cięższy|lżejszy|bardziej kruchy].
= Występowanie
{self.nom} spotyka się w skałach [wulkanicznych|osadowych|metamorficznych] w dolinie {river.gen}.
Największe złoże leży koło {town2.gen}; wydobycie trwa od {described+2-40} roku.
Razem z {self.ins} występują {mineral2.nom} i {mineral3.nom}.
= Historia
Minerał opisał{scholar.a} {scholar.nom}, {scholar.job.nom}, badając okazy, które znalazł{friend.a} {friend.nom}.
+ {scholar.last.nom} początkowo uważał{scholar.a} {self.acc} za odmianę {mineral2.gen}.
W {town2.loc} {self.ins} barwiono szkło, [co opisał{friend.a} {friend.nom}|dopóki nie zamknięto tam huty].
= Stanowiska
* {new_town.nom} – okaz ważący {12-900:gramów}
~ Minerały; Odkrycia {described:wiek} wieku
@ club klub/mu
> {self.nom} – klub [piłkarski|piłki ręcznej|hokejowy] z {town.gen}, założony {founding} roku.
= Historia
Założycielem klubu był {man.nom}, {man.job.nom} z {town.gen}.
Pierwszy mecz {self.nom} rozegrał{self.a} w {started} roku w {town2.loc}, przegrywając z drużyną gospodarzy.
Największy rywal to drużyna z {town3.gen}; [mecze to derby doliny {river.gen}|zespoły grają od {started} roku].
= Sezon {season}/{season_end}
W sezonie {season}/{season_end} zespół rozegrał {played:meczów}: wygrał {wins}, zremisował {draws} i przegrał {losses}.
+ Za {wins:zwycięstw} i {draws:remisów} {self.nom} otrzymał{self.a} {points:punktów}.
Najlepszym strzelcem był {man2.nom}, [środkowy|lewy|prawy] napastnik, sprowadzony z {town3.gen}.
Drużynę prowadził{trainer.a} wtedy {trainer.nom}, wcześniej {trainer.job.nom} w {town2.loc}.
= Stadion
Stadion w {town.loc} leży nad {river.ins} i ma {seats:miejsc}; otwarto go w {started+4-30} roku.
Od {1996-2015} roku jego patronem jest {man.nom}.
= Wyniki
* {1956-2019} – {1-16}. miejsce, {12-70:punktów}
~ Kluby sportowe w województwie {region}im; {town.nom}
@ shared -
= W kulturze
W {1955-1999} roku {person9.nom} poświęcił{person9.a} {self.dat} [album fotografii|słuchowisko radiowe|cykl akwarel].
+ Po latach {person9.last.nom} przyznał{person9.a}, że o {self.loc} po raz pierwszy usłyszał{person9.a} w {town7.loc}.
W {1960-2010} roku wydano znaczek pocztowy poświęcony {self.dat}, w nakładzie {20000-900000} egzemplarzy.
Wystawę „{title7}” o {self.loc} pokazano w {town7.loc} i {town8.loc}; obejmowała {30-400:fotografii}.
W {town8.loc} śpiewa się pieśń o {self.loc}, którą w {1958-2001} roku spisał{person8.a} {person8.nom}.
= Badania
Najobszerniejszą pracę o {self.loc}, „{title8}”, ogłosił{critic.a} w {1956-2015} roku {critic.nom} z {town7.gen}.
+ Z tezami {critic.last.gen} nie zgadzał{person7.a} się {person7.nom}, {person7.job.nom} z {town8.gen}.
W archiwum w {town7.loc} zachowały się dokumenty dotyczące {self.gen}, [w tym|między innymi] {12-400:listów}.
= Kalendarium
* {1955-2021} – [wystawa o {self.loc} w {new_town.loc}|{new_person.nom} wygłasza w {new_town.loc} wykład o {self.loc}]
* {1955-2021} – {new_person.nom} [wydaje pracę „{new_title}”|otrzymuje nagrodę za pracę] o {self.loc}
= Bibliografia
* {new_person.nom}, „{new_title}”, {new_town.nom} {1955-2020}, s. {40-400}
"""


class Kind(NamedTuple):
    """A parsed block of ARTICLES; each sentence is the list of its wordings."""

    maker: str
    nouns: list[Noun]
    openings: list[str]
    sections: list[tuple[list[str], list[list[str]], list[list[str]]]]  # heading, sentences, list items
    closing: list[str]


def wordings(template: str) -> list[str]:
    """All ways to read a template: "[lewy|prawy] dopływ" gives two."""
    parts = re.split(r"\[(.*?)\]", template)
    return ["".join(choice) for choice in product(*(p.split("|") if i % 2 else [p] for i, p in enumerate(parts)))]


def parse_articles(text: str) -> list[Kind]:
    """The blocks of ARTICLES; the first character of a line says what it is."""
    kinds = []
    for line in text.strip().split("\n"):
        mark, rest = line[0], line[2:]
        if mark == "@":
            maker, nouns = rest.split()
            nouns = [decline(*noun.split("/")) for noun in nouns.split("|") if noun != "-"]
            kinds.append(Kind(maker, nouns, [], [], []))
        elif mark == ">":
            kinds[-1].openings.extend(wordings(rest))
        elif mark == "=":
            kinds[-1].sections.append((wordings(rest), [], []))
        elif mark == "~":
            kinds[-1].closing.append("Kategorie: " + rest)
        elif mark == "*":
            kinds[-1].sections[-1][2].append(wordings(line))
        else:
            kinds[-1].sections[-1][1].append(wordings(line))
    return kinds


*KINDS, SHARED = parse_articles(ARTICLES.replace("\n+ ", " "))
# z and w become ze and we before some groups of consonants: ze Starzyc, we wrześniu.
HARD_TO_SAY = re.compile(
    r"[ZzWw](?<!\w\w) (?=(?:(?<=[Zz] )(?:[Ss]z|[Ss](?!z)|[ŚśZzŹźŻż])|(?<=[Ww] )[WwFf])[bcćdfghjklłmnńprstwzźż])"
)


def document(seed: int, index: int) -> str:
    """Article number `index` of the corpus with this seed."""
    rng = Random(f"{seed}/{index}")  # a string is hashed the same way in every Python process
    facts = Facts(rng)
    kind = facts.pick(KINDS)
    if kind.nouns:
        facts["it"] = facts.pick(kind.nouns)
    facts["self"] = MAKERS[kind.maker](facts)
    facts.setdefault("it", facts["self"].job)
    length = min(5900.0, max(320.0, math.exp(rng.gauss(math.log(950), 0.75))))

    blocks = [facts.sentence(kind.openings)]
    written = len(blocks[0])
    shared = sorted(SHARED.sections, key=lambda _: rng.random())
    sections = [*kind.sections, shared[0]]
    rng.shuffle(sections)
    for heading, sentences, items in sections + shared[1:]:
        missing = int(length) - written
        if missing < 40:
            break
        if items or len(blocks) > 1 or rng.random() < 0.4:  # only the first may lack one
            blocks.append(f"== {facts.sentence(heading)} ==")
        if sentences:  # a subset in the given order, so that history runs forward
            count = min(len(sentences), 1 + missing // 200)
            chosen = sorted(sorted(range(len(sentences)), key=lambda _: rng.random())[:count])
            text = " ".join([facts.sentence(sentences[position]) for position in chosen])
        else:  # sorted by year or name, one entry each
            entries = [facts.sentence(items[min(n, len(items) - 1)]) for n in range(min(24, 3 + missing // 250))]
            text = "\n".join(sorted({entry.split(" – ")[0]: entry for entry in entries}.values()))
        blocks.append(text)
        written += len(text) + 20
    if kind.closing and rng.random() < 0.5:
        blocks.append(facts.sentence(kind.closing))
    return HARD_TO_SAY.sub(lambda found: found[0][0] + "e ", "\n\n".join(blocks))


def generate_documents(count: int, seed: int = 0) -> Iterator[str]:
    """Yields `count` documents; document i depends only on (seed, i), so a longer corpus starts with the shorter one.

    Raises ValueError at the call, not at the first document, if `count` is less than 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}: ask generate_documents for one document or more")
    return (document(seed, index) for index in range(count))


def main() -> None:
    """Prints three documents and the statistics of five thousand."""
    for text in generate_documents(3):
        print(text, end="\n\n" + "-" * 80 + "\n\n")
    start = time.perf_counter()
    texts = list(generate_documents(5000))
    seconds = time.perf_counter() - start
    words = {word for text in texts for word in re.findall(r"[^\W\d_]+", text)}
    print(
        f"{len(texts)} documents, {sum(map(len, texts))} characters, {len(words)} distinct word forms, "
        f"{len(texts) / seconds:.0f} documents per second"
    )


if __name__ == "__main__":
    main()
