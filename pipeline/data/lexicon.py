"""The English and German words of the built-in corpus, with the inflected forms that grammar.py uses."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Noun:
    kind: str  # person, animal, thing, place
    en: str
    en_plural: str
    de: str
    gender: str  # m, f, n
    genitive: str  # singular
    plural: str  # nominative


@dataclass(frozen=True)
class Verb:
    """The principal parts. The German infinitive an|rufen has a separable prefix."""

    frame: str  # the verb's complements, a key of VERBS
    en: str
    en_third: str
    en_past: str
    en_participle: str
    particle: str  # "up" of "pick up", or empty
    de: str  # infinitive without the separable prefix
    prefix: str  # separable, or empty
    third: str
    past: str
    auxiliary: str  # hat, ist
    participle: str


@dataclass(frozen=True)
class Adjective:
    en: str
    de: str  # the stem, without an ending


def _rows(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines() if line.strip()]


def _nouns(kind: str, table: str) -> list[Noun]:
    return [Noun(kind, *row) for row in _rows(table)]


def _verbs(frame: str, table: str) -> list[Verb]:
    verbs = []
    for en, third, past, participle, de, *german in _rows(table):
        en, _, particle = en.partition("|")
        prefix, _, stem = de.rpartition("|")
        verbs.append(Verb(frame, en, third, past, participle, particle, stem, prefix, *german))
    return verbs


def _adjectives(table: str) -> list[Adjective]:
    return [Adjective(*row) for row in _rows(table)]


NOUNS = {
    "person": _nouns(
        "person",
        """
        man men Mann m Mannes Männer
        woman women Frau f Frau Frauen
        child children Kind n Kindes Kinder
        girl girls Mädchen n Mädchens Mädchen
        boy boys Junge m Jungen Jungen
        doctor doctors Arzt m Arztes Ärzte
        teacher teachers Lehrer m Lehrers Lehrer
        student students Student m Studenten Studenten
        king kings König m Königs Könige
        queen queens Königin f Königin Königinnen
        neighbour neighbours Nachbar m Nachbarn Nachbarn
        aunt aunts Tante f Tante Tanten
        uncle uncles Onkel m Onkels Onkel
        sister sisters Schwester f Schwester Schwestern
        brother brothers Bruder m Bruders Brüder
        farmer farmers Bauer m Bauern Bauern
        witch witches Hexe f Hexe Hexen
        thief thieves Dieb m Diebes Diebe
        """,
    ),
    "animal": _nouns(
        "animal",
        """
        dog dogs Hund m Hundes Hunde
        cat cats Katze f Katze Katzen
        horse horses Pferd n Pferdes Pferde
        bird birds Vogel m Vogels Vögel
        mouse mice Maus f Maus Mäuse
        bear bears Bär m Bären Bären
        cow cows Kuh f Kuh Kühe
        rabbit rabbits Kaninchen n Kaninchens Kaninchen
        fox foxes Fuchs m Fuchses Füchse
        goose geese Gans f Gans Gänse
        """,
    ),
    "thing": _nouns(
        "thing",
        """
        book books Buch n Buches Bücher
        letter letters Brief m Briefes Briefe
        apple apples Apfel m Apfels Äpfel
        key keys Schlüssel m Schlüssels Schlüssel
        picture pictures Bild n Bildes Bilder
        flower flowers Blume f Blume Blumen
        bottle bottles Flasche f Flasche Flaschen
        chair chairs Stuhl m Stuhls Stühle
        lamp lamps Lampe f Lampe Lampen
        knife knives Messer n Messers Messer
        hat hats Hut m Hutes Hüte
        coat coats Mantel m Mantels Mäntel
        bicycle bicycles Fahrrad n Fahrrads Fahrräder
        newspaper newspapers Zeitung f Zeitung Zeitungen
        basket baskets Korb m Korbes Körbe
        """,
    ),
    "place": _nouns(
        "place",
        """
        garden gardens Garten m Gartens Gärten
        kitchen kitchens Küche f Küche Küchen
        house houses Haus n Hauses Häuser
        church churches Kirche f Kirche Kirchen
        school schools Schule f Schule Schulen
        park parks Park m Parks Parks
        castle castles Schloss n Schlosses Schlösser
        tower towers Turm m Turms Türme
        village villages Dorf n Dorfes Dörfer
        hotel hotels Hotel n Hotels Hotels
        library libraries Bibliothek f Bibliothek Bibliotheken
        theatre theatres Theater n Theaters Theater
        factory factories Fabrik f Fabrik Fabriken
        """,
    ),
}

VERBS = {
    frame: _verbs(frame, table)
    for frame, table in {
        "animate": """
            visit visits visited visited besuchen besucht besuchte hat besucht
            greet greets greeted greeted grüßen grüßt grüßte hat gegrüßt
            watch watches watched watched beobachten beobachtet beobachtete hat beobachtet
            call calls called called an|rufen ruft rief hat angerufen
            invite invites invited invited ein|laden lädt lud hat eingeladen
            pick|up picks picked picked ab|holen holt holte hat abgeholt
            attack attacks attacked attacked an|greifen greift griff hat angegriffen
            wake wakes woke woken auf|wecken weckt weckte hat aufgeweckt
            mock mocks mocked mocked aus|lachen lacht lachte hat ausgelacht
            catch catches caught caught fangen fängt fing hat gefangen
            praise praises praised praised loben lobt lobte hat gelobt
            warn warns warned warned warnen warnt warnte hat gewarnt
            meet meets met met treffen trifft traf hat getroffen
            love loves loved loved lieben liebt liebte hat geliebt
            know knows knew known kennen kennt kannte hat gekannt
            """,
        "dative": """
            help helps helped helped helfen hilft half hat geholfen
            follow follows followed followed folgen folgt folgte ist gefolgt
            thank thanks thanked thanked danken dankt dankte hat gedankt
            trust trusts trusted trusted vertrauen vertraut vertraute hat vertraut
            answer answers answered answered antworten antwortet antwortete hat geantwortet
            obey obeys obeyed obeyed gehorchen gehorcht gehorchte hat gehorcht
            """,
        "anything": """
            see sees saw seen sehen sieht sah hat gesehen
            find finds found found finden findet fand hat gefunden
            forget forgets forgot forgotten vergessen vergisst vergaß hat vergessen
            draw draws drew drawn zeichnen zeichnet zeichnete hat gezeichnet
            hide hides hid hidden verstecken versteckt versteckte hat versteckt
            carry carries carried carried tragen trägt trug hat getragen
            bring|back brings brought brought zurück|bringen bringt brachte hat zurückgebracht
            """,
        "thing": """
            buy buys bought bought kaufen kauft kaufte hat gekauft
            sell sells sold sold verkaufen verkauft verkaufte hat verkauft
            steal steals stole stolen stehlen stiehlt stahl hat gestohlen
            repair repairs repaired repaired reparieren repariert reparierte hat repariert
            pack packs packed packed ein|packen packt packte hat eingepackt
            throw|away throws threw thrown weg|werfen wirft warf hat weggeworfen
            lose loses lost lost verlieren verliert verlor hat verloren
            need needs needed needed brauchen braucht brauchte hat gebraucht
            """,
        "give": """
            give gives gave given geben gibt gab hat gegeben
            show shows showed shown zeigen zeigt zeigte hat gezeigt
            send sends sent sent schicken schickt schickte hat geschickt
            lend lends lent lent leihen leiht lieh hat geliehen
            offer offers offered offered an|bieten bietet bot hat angeboten
            promise promises promised promised versprechen verspricht versprach hat versprochen
            """,
        "alone": """
            sleep sleeps slept slept schlafen schläft schlief hat geschlafen
            laugh laughs laughed laughed lachen lacht lachte hat gelacht
            cry cries cried cried weinen weint weinte hat geweint
            sing sings sang sung singen singt sang hat gesungen
            work works worked worked arbeiten arbeitet arbeitete hat gearbeitet
            wait waits waited waited warten wartet wartete hat gewartet
            dance dances danced danced tanzen tanzt tanzte hat getanzt
            arrive arrives arrived arrived an|kommen kommt kam ist angekommen
            get|up gets got got auf|stehen steht stand ist aufgestanden
            disappear disappears disappeared disappeared verschwinden verschwindet verschwand ist verschwunden
            """,
        "motion": """
            run runs ran run rennen rennt rannte ist gerannt
            walk walks walked walked gehen geht ging ist gegangen
            jump jumps jumped jumped springen springt sprang ist gesprungen
            flee flees fled fled fliehen flieht floh ist geflohen
            crawl crawls crawled crawled kriechen kriecht kroch ist gekrochen
            """,
        "that": """
            say says said said sagen sagt sagte hat gesagt
            believe believes believed believed glauben glaubt glaubte hat geglaubt
            know knows knew known wissen weiß wusste hat gewusst
            claim claims claimed claimed behaupten behauptet behauptete hat behauptet
            hope hopes hoped hoped hoffen hofft hoffte hat gehofft
            """,
    }.items()
}
OBJECTS = {
    "animate": ("person", "animal"), "dative": ("person", "animal"), "anything": ("person", "animal", "thing"),
    "thing": ("thing",), "give": ("thing",),
}  # fmt: skip
PERSONS_ONLY = ("thing", "give", "that")  # frames whose subject must be a person
WITHOUT_MANNER = (
    "meet", "love", "know", "trust", "see", "find", "forget", "lose", "need", "sleep", "arrive", "disappear",
)  # fmt: skip

_ANY = """
    old alt
    small klein
    big groß
    beautiful schön
    strange seltsam
    famous berühmt
    """
_LIVING = """
    young jung
    tired müd
    clever klug
    brave mutig
    """
ADJECTIVES = {
    "person": _adjectives(_ANY + _LIVING + "sad traurig\n friendly freundlich"),
    "animal": _adjectives(_ANY + _LIVING + "hungry hungrig\n lazy faul"),
    "thing": _adjectives(_ANY + "new neu\n heavy schwer\n red rot\n expensive teur\n cheap billig\n green grün"),
    "place": _adjectives(_ANY + "new neu\n quiet ruhig\n dark dunkl\n modern modern\n empty leer"),
}

# English tree and German words. {number}, {hour} and {year} are replaced by digits.
_HOUR = ("(PP (IN at) (NP (CD {hour}) (RB o'clock)))", "um {hour} Uhr")
_EVENING = ("(PP (IN in) (NP (DT the) (NN evening)))", "am Abend")
_MONDAY = ("(PP (IN on) (NP (NNP Monday)))", "am Montag")
_SUNDAY = ("(PP (IN on) (NP (NNP Sunday)))", "am Sonntag")
_TODAY = ("(NP (NN today))", "heute")
TIMES = {
    "past": (
        _HOUR, _EVENING, _MONDAY, _SUNDAY,
        ("(NP (NN yesterday))", "gestern"),
        ("(NP (JJ last) (NN week))", "letzte Woche"),
        ("(ADVP (NP (CD {number}) (NNS days)) (RB ago))", "vor {number} Tagen"),
        ("(ADVP (NP (CD {number}) (NNS years)) (RB ago))", "vor {number} Jahren"),
        ("(PP (IN in) (NP (CD {year})))", "im Jahr {year}"),
    ),
    "present": (
        _HOUR, _EVENING, _TODAY,
        ("(NP (DT every) (NN day))", "jeden Tag"),
        ("(NP (DT every) (NN morning))", "jeden Morgen"),
    ),
    "perfect": (
        _TODAY,
        ("(NP (DT this) (NN week))", "diese Woche"),
        ("(NP (CD {number}) (NNS times))", "{number} Mal"),
    ),
    "modal": (
        _HOUR, _EVENING, _MONDAY, _SUNDAY, _TODAY,
        ("(NP (NN tomorrow))", "morgen"),
        ("(NP (JJ next) (NN week))", "nächste Woche"),
        ("(PP (IN in) (NP (CD {number}) (NNS days)))", "in {number} Tagen"),
    ),
}  # fmt: skip
MANNERS = (
    ("(PP (IN with) (NP (JJ great) (NN care)))", "mit großer Sorgfalt"),
    ("(PP (IN with) (NP (DT a) (NN smile)))", "mit einem Lächeln"),
    ("(PP (IN without) (NP (DT a) (NN word)))", "ohne ein Wort"),
)
MANNER_ADVERBS = (
    ("quietly", "leise"), ("carefully", "vorsichtig"), ("secretly", "heimlich"),
    ("gladly", "gern"), ("patiently", "geduldig"), ("quickly", "schnell"),
)  # fmt: skip
FREQUENCY_ADVERBS = (("often", "oft"), ("always", "immer"), ("never", "nie"), ("rarely", "selten"))
PLACES = (
    ("(PP (IN in) {})", "in"),
    ("(PP (IN behind) {})", "hinter"),
    ("(PP (IN beside) {})", "neben"),
    ("(PP (IN in) (NP (NP (NN front)) (PP (IN of) {})))", "vor"),
)
INTO = ("(PP (IN into) {})", "in")
MODALS = {
    "can": ("kann", "können"), "must": ("muss", "müssen"), "may": ("darf", "dürfen"),
    "should": ("soll", "sollen"), "will": ("wird", "werden"),
}  # fmt: skip
CONJUNCTIONS = {"and": "und", "but": "aber"}
SUBORDINATORS = {
    "because": "weil", "although": "obwohl", "while": "während", "before": "bevor", "if": "wenn",
}  # fmt: skip
SIMPLE_TENSE = ("while", "before", "if")  # subordinators whose clause has no perfect and no modal
# Syllables of names. None ends in -s, because the genitive of such names is written differently.
SYLLABLES = (
    "ka", "lo", "mi", "ta", "ru", "ne", "so", "vi", "da", "pe",
    "ga", "ri", "mo", "le", "na", "tu", "fa", "bo", "ki", "se",
)  # fmt: skip
