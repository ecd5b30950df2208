"""Word lists of the citation checker, English; other languages have terms all the same."""

STOP_WORDS = frozenset(
    "a an the this that these those it its he him his she her hers they them their theirs we us "
    "our you your i me my mine who whom whose which what where when why how there here is are was "
    "were be been being am do does did done doing have has had having will would shall should can "
    "could may might must of in on at by for from with to into onto as than then so if or and but "
    "nor yet about over under between through per via up down out off again too very just also "
    "only own same such each any some other another both more most all s d ll re ve m t because "
    "while although though since until during against among within upon however therefore thus "
    "hence e g e.g i.e etc said".split()
)
# What a sentence may say about itself or about where it looked; no claim.
META_WORDS = frozenset(
    "yes no yeah yep nope sure certainly ok okay hello hi thanks thank welcome please sorry answer "
    "accord passage context document text information provide mention state base source question "
    "following follow".split()
)
NEGATIONS = frozenset(
    "not no never none nor neither nobody nothing nowhere without cannot hardly lack lacks lacked "
    "lacking unable".split()
)
UNITS = {
    word: unit
    for unit, words in {
        "percent": "percent",
        "dollar": "dollar",
        "euro": "euro",
        "pound": "pound",
        "yen": "yen",
        "second": "second sec",
        "minute": "minute min",
        "hour": "hour hr",
        "day": "day",
        "week": "week",
        "month": "month",
        "year": "year",
        "metre": "metre meter m",
        "km": "km kilometre kilometer",
        "cm": "cm centimetre centimeter",
        "mm": "mm millimetre millimeter",
        "mile": "mile mi",
        "foot": "foot feet ft",
        "inch": "inch",
        "kg": "kg kilogram",
        "g": "gram",
        "tonne": "tonne ton",
        "lb": "lb",
        "KB": "kb kilobyte",
        "MB": "mb megabyte",
        "GB": "gb gigabyte",
        "degree": "degree",
    }.items()
    for word in words.split()
}
SIGNS = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "%": "percent"}
ONES = dict(
    zip(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen".split(),
        range(20),
        strict=True,
    )
)
TENS = dict(
    zip("twenty thirty forty fifty sixty seventy eighty ninety".split(), range(20, 100, 10),
        strict=True)
)  # fmt: skip
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9,
           "trillion": 10**12}  # fmt: skip
ORDINALS = {
    word: f"{number}th"
    for number, word in enumerate(
        "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split(),
        start=1,
    )
} | {"last": "last"}
MONTHS = {
    name: f"month {number}"
    for number, names in enumerate(
        "january jan,february feb,march mar,april apr,may,june jun,july jul,august aug,"
        "september sep sept,october oct,november nov,december dec".split(","),
        start=1,
    )
    for name in names.split()
}
POLES = {
    word: (group, pole)
    for group, pair in enumerate(
        [
            ("more", "less fewer"), ("most", "least"), ("before", "after"), ("above", "below"),
            ("increase increased increases increasing rise rises rose grew",
             "decrease decreased decreases decreasing fall falls fell shrank decline declined"),
            ("higher high highest", "lower low lowest"), ("maximum", "minimum"),
            ("larger large largest bigger", "smaller small smallest"), ("north northern", "south "
             "southern"), ("east eastern", "west western"), ("always", "sometimes"),
            ("allowed permitted allow allows may", "forbidden prohibited forbid forbids banned"),
            ("possible", "impossible"), ("open opens opened", "closed closes close"),
            ("win wins won", "lose loses lost"), ("true", "false"),
            ("inside", "outside"), ("older", "younger"), ("longer", "shorter"),
            ("required mandatory compulsory", "optional"), ("early earlier", "late later"),
            ("with", "without"), ("faster", "slower"), ("enabled enable", "disabled disable"),
        ]
    )
    for pole, words in enumerate(pair)
    for word in words.split()
    if word not in STOP_WORDS | NEGATIONS or word in ("more", "most")
}  # fmt: skip
PARTICLES = frozenset("de von van der du di da la le bin".split())
