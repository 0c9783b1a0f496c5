"""English words for reading and labels: some to be held out of training, many to learn from; invented words.

`words.txt` holds words of 3 to 6 letters that are both in SCOWL's list of common ones and a token of the language
model, most common first: with 664 words to learn from, a model reads letter by letter and never expects a word.
It knows nothing of pictures or tokenizers.
"""

from pathlib import Path

# Every sixth of these is held out.
WORDS = tuple(
    dict.fromkeys(
        """
    act add age ago air all and ant any arm art ask bad bag ban bar bat bay bed bee bet big bit box boy bug bus buy
    cab can cap car cat cow cry cup cut day dog dot dry due ear eat egg end eye fan far fat fee few fig fit fix fly
    fog fox fun fur gap gas get gum gym hat hen hip hit hot hub ice ink jam jar jet job joy key kid kit lab lap
    law leg lid lip log lot low mad man map mat mix mom mud mug net new nod now nut oak oil old one owl own pan pay
    pea pen pet pie pig pin pit pop pot pub put rag ram rat raw red rib rim rod row rub rug run sad sea see set shy
    sit six ski sky sob son sum sun tab tag tan tap tax tea ten tie tin tip toe top toy try tub two use van vet war
    wax way web wet win wit yes you zip zoo
    able area army atom baby back bake ball band bank barn base bath beam bean bear beat bell belt best bike bird
    bite blue boat body bold bone book boot born both bowl burn bush busy cafe cake call calm camp card care cart
    case cash cave cell chat chef chin city clay clip club coal coat code coin cold come cook cool copy corn crab
    crew crop cube dark data date dawn deal deer desk dial dish dock door dove down draw drop drum duck dust earn
    east easy edge else even exit face fact fair fall farm fast film find fine fire fish flag flat flow foam folk
    food foot fork form fort four free frog fuel full game gate gift girl give glad glow goal goat gold golf good
    gray grid grow hair half hall hand hard harp hate hawk head heat help herb hero hill hold hole home hook hope
    horn host hour huge idea inch iron item jazz join jump june junk just keep kind king kite knee knot lake lamp
    land last lawn lazy leaf left lift like lime line lion list live loaf lock long look loop loud love luck lung
    mail main make mall many mark mask meal meat melt menu mild milk mind mint moon more moth move much nail name
    navy neck need nest news next nice nine noon nose note oven over pack page pair palm park part past path peak
    pear pick pine pink pipe plan play plum poem pole pond pool port post pull pump pure quiz race rail rain read
    rest rice rich ring ripe rise road rock role roof room root rope rose ruby rule safe sail salt sand save seal
    seat seed sell send ship shoe shop show sick side sign silk sing sink size skin slow snow soap sock sofa soft
    soil song soon soup spin star stay stem step stop sugar swim tail talk tall tank tape task team tent test text
    thin tide time tiny tire tone tool town tree trip true tube tune turn twin unit user vase vast vine vote wait
    walk wall warm wash wave weak wear week well west wheat wide wild wind wing wise wish wolf wood wool word work
    yard year zero zone
    actor apple arrow bacon badge basic beach berry black blade blank block bloom board brain brave bread brick
    bride brush cabin camel candy chair chalk charm chess chest child cider clean clear climb clock cloud coach
    coast cover craft cream crisp crowd crown curve daily dance delta diner dozen drama dream dress drink drive
    eagle early earth elbow enjoy equal event extra fairy field flame flash floor flour fluid focus fresh front
    frost fruit ghost giant glass globe glove grain grape grass great green group guard guest guide happy heart
    honey horse hotel house human ideal image juice kayak knife label large laser laugh layer lemon level light
    lobby local lucky lunch magic maple march metal model money month motor mount mouse mouth movie music night
    noble north novel nurse ocean olive onion orbit order paint panel paper party peace peach pearl phone photo
    piano pilot pizza place plane plant plate point power price prize proud queen quick quiet quilt radio rapid
    ready river robot round royal salad sauce scale scarf score shape share sharp sheep shelf shell shine shirt
    shore skate skill sleep slice small smart smile smoke snack snake solar sound south space spark spoon sport
    spray staff stage stair steam stone store storm story sunny sweet table tiger title toast today torch total
    touch tower toxic track trade trail train truck trunk uncle under value video visit voice wagon watch water
    whale wheel white woman world yacht young zebra
    """.split()
    )
)
TEST_WORDS = WORDS[::6]
_TEST = frozenset(TEST_WORDS)
_MANY = Path(__file__).with_name("words.txt").read_text().split()
TRAIN_WORDS = tuple(word for word in dict.fromkeys([*WORDS, *_MANY]) if word not in _TEST)
_STARTS = "b c d f g h j k l m n p r s t v w z bl br ch cl cr dr fl fr gl gr pl pr sc sh sk sl sp st th tr".split()
_MIDDLES = "a e i o u a e i o u ai ea ee oo ou".split()
_ENDS = "b d g k l m n p r s t x y ck ll nd ng nt rd rk rt st".split() + [""] * 6


def invented(rng) -> str:
    """A pronounceable word of 3 to 8 letters from a numpy generator; half of them are plain random letters."""
    if rng.random() < 0.5:
        letters = list("abcdefghijklmnopqrstuvwxyz")
        return "".join(rng.choice(letters, int(rng.integers(3, 8))))
    while True:
        word = "".join(
            f"{rng.choice(_STARTS)}{rng.choice(_MIDDLES)}{rng.choice(_ENDS)}" for _ in range(rng.integers(1, 3))
        )
        if 3 <= len(word) <= 8 and word not in _TEST:
            return word
