# ruff: noqa: RUF001  (Polish text uses the en dash on purpose)
"""The generated Polish corpus: deterministic, correctly inflected, consistent inside a document, and varied."""

import re
import statistics
import unicodedata

import pytest

from polish_grammar import MONTHS, Number, adjective, attach, decline, phrase, plural
from sample_documents import generate_documents

DOCUMENTS = list(generate_documents(2000))
TEXT = "\n".join(DOCUMENTS)


def test_document_depends_only_on_seed_and_index():
    assert list(generate_documents(50)) == DOCUMENTS[:50]
    assert list(generate_documents(20, seed=1)) != DOCUMENTS[:20]
    assert len(set(DOCUMENTS)) == len(DOCUMENTS)


def test_count_below_one_is_refused_at_the_call():
    with pytest.raises(ValueError, match="count must be at least 1"):
        generate_documents(0)


def test_lengths_are_spread():
    lengths = sorted(map(len, DOCUMENTS))
    assert 700 < statistics.median(lengths) < 1300
    assert lengths[len(lengths) // 10] < 600 and lengths[-len(lengths) // 50] > 3000
    assert lengths[0] >= 150 and lengths[-1] < 7000


@pytest.mark.parametrize(
    ("number", "form"),
    [
        (1, "rok"),
        (2, "lata"),
        (4, "lata"),
        (5, "lat"),
        (12, "lat"),
        (14, "lat"),
        (21, "lat"),
        (22, "lata"),
        (112, "lat"),
    ],
)
def test_numeral_forms(number, form):
    assert plural(number, "rok", "lata", "lat") == form
    assert f"{Number(number):lat}" == f"{number} {form}"


def test_numbers():
    assert f"{Number(1410):wiek} {Number(1400):wiek} {Number(1901):wiek}" == "XV XIV XX"
    assert f"{Number(1234)} {Number(45678):osób}" == "1234 45 678 osób"


@pytest.mark.parametrize(
    ("word", "gender", "cases"),
    [
        ("Lipowiec", "m", "Lipowiec Lipowca Lipowcowi Lipowiec Lipowcem Lipowcu"),
        ("Radosławów", "m", "Radosławów Radosławowa Radosławowowi Radosławów Radosławowem Radosławowie"),
        ("Brzeziny", "p", "Brzeziny Brzezin Brzezinom Brzeziny Brzezinami Brzezinach"),
        ("Lipiczki", "p", "Lipiczki Lipiczek Lipiczkom Lipiczki Lipiczkami Lipiczkach"),
        ("Olszewo", "n", "Olszewo Olszewa Olszewu Olszewo Olszewem Olszewie"),
        ("rzeka", "f", "rzeka rzeki rzece rzekę rzeką rzece"),
        ("Bystrzyca", "f", "Bystrzyca Bystrzycy Bystrzycy Bystrzycę Bystrzycą Bystrzycy"),
        ("Zofia", "f", "Zofia Zofii Zofii Zofię Zofią Zofii"),
        ("Jadwiga", "f", "Jadwiga Jadwigi Jadwidze Jadwigę Jadwigą Jadwidze"),
        ("Elżbieta", "f", "Elżbieta Elżbiety Elżbiecie Elżbietę Elżbietą Elżbiecie"),
        ("Zygmunt", "ma", "Zygmunt Zygmunta Zygmuntowi Zygmunta Zygmuntem Zygmuncie"),
        ("Marek", "ma", "Marek Marka Markowi Marka Markiem Marku"),
        ("Brzeziński", "ma", "Brzeziński Brzezińskiego Brzezińskiemu Brzezińskiego Brzezińskim Brzezińskim"),
        ("Lipowska", "f", "Lipowska Lipowskiej Lipowskiej Lipowską Lipowską Lipowskiej"),
        ("szczyt", "mu", "szczyt szczytu szczytowi szczyt szczytem szczycie"),
        ("miasto", "n", "miasto miasta miastu miasto miastem mieście"),
    ],
)
def test_declension(word, gender, cases):
    assert " ".join(decline(word, gender)[:6]) == cases


def test_adjectives_and_suffixes():
    assert adjective("wielk", "n") == ["wielkie", "wielkiego", "wielkiemu", "wielkie", "wielkim", "wielkim"]
    assert adjective("now", "p") == ["nowe", "nowych", "nowym", "nowe", "nowymi", "nowych"]
    assert phrase(decline("Lipowice", "p"), "Star", adjective_first=True).loc == "Starych Lipowicach"
    joined = [attach("brzez", "iński"), attach("star", "ice"), attach("wilk", "in"), attach("olsz", "owo")]
    assert joined == ["brzeziński", "starzyce", "wilczyn", "olszewo"]


def test_age_is_death_minus_birth():
    date = rf"(\d+) ({'|'.join(MONTHS)}) (\d+)"
    checked = 0
    for text in DOCUMENTS:
        dates = re.search(rf"\(ur\. {date}.*?zm\. {date}", text)
        age = re.search(r"Zmarła? w wieku (\d+) lat", text)
        if dates and age:
            day, month, year, last_day, last_month, last_year = dates.groups()
            before_birthday = (MONTHS.index(last_month), int(last_day)) < (MONTHS.index(month), int(day))
            assert int(age[1]) == int(last_year) - int(year) - before_birthday
            checked += 1
    assert checked > 10


def test_density_is_population_over_area():
    checked = 0
    for text in DOCUMENTS:
        area = re.search(r"zajmuje (\d+(?:,\d+)?) km²", text)
        people = re.search(r"liczył[ao] ([\d ]+) mieszkańc\w+, a gęstość zaludnienia wynosiła (\d+)", text)
        if area and people:
            density = int(people[1].replace(" ", "")) / float(area[1].replace(",", "."))
            assert abs(density - int(people[2])) <= 0.5
            checked += 1
    assert checked > 10


def test_season_points_and_mineral_weight():
    seasons = re.findall(r"wygrał (\d+), zremisował (\d+) i przegrał \d+\. Za .*? otrzymała? (\d+) punkt", TEXT)
    minerals = re.findall(r"wynosi (\d,\d) g/cm³, więc bryłka o objętości 10 cm³ waży około (\d+) g", TEXT)
    assert len(seasons) > 10 and len(minerals) > 10
    assert all(3 * int(wins) + int(draws) == int(points) for wins, draws, points in seasons)
    assert all(round(10 * float(density.replace(",", "."))) == int(weight) for density, weight in minerals)


def test_vocabulary_is_open_ended():
    words = [set(re.findall(r"[^\W\d_]+", "\n".join(part))) for part in (DOCUMENTS[:1000], DOCUMENTS[1000:])]
    assert len(words[0] | words[1]) > 20_000
    assert len(words[1] - words[0]) > 5_000  # the second thousand still brings new forms


def test_text_is_clean():
    assert not re.search(r"[{}\[\]|]|  | [,.;]|\bNone\b|\.\.", TEXT)
    assert unicodedata.is_normalized("NFC", TEXT)
    assert TEXT.encode("utf-8").decode("utf-8") == TEXT
    assert set("ąćęłńóśźż„”–") <= set(TEXT)
    assert not re.search(r"\b[Zz] (S[tkłmnp]|Św|Zb)|\b[Ww] (W[rłs]|wrz)", TEXT)  # ze Starzyc, we wrześniu
