# ruff: noqa: RUF001  (Polish uses en dashes on purpose)
"""The templates of sample_documents.py: what articles of each kind may say. All of it is invented."""

import re
from itertools import product
from typing import NamedTuple

from polish_grammar import Noun, decline

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
