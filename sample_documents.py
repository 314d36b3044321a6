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
from random import Random

from polish_grammar import Day, Decimal, Noun, Number, attach, decline, extend, phrase
from sample_articles import KINDS, SHARED

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

# --- Documents --------------------------------------------------------------------------------------------------------

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
