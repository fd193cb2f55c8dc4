"""Class names of two public data sets, so that token counts are real ones."""

from __future__ import annotations


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.replace("\n", " ").split(","))


# Describable Textures, 47 classes: 1.96 tokens a name.
DTD = _names(
    """
    banded, blotchy, braided, bubbly, bumpy, chequered, cobwebbed, cracked, crosshatched, crystalline, dotted,
    fibrous, flecked, freckled, frilly, gauzy, grid, grooved, honeycombed, interlaced, knitted, lacelike, lined,
    marbled, matted, meshed, paisley, perforated, pitted, pleated, polka-dotted, porous, potholed, scaly,
    smeared, spiralled, sprinkled, stained, stratified, striped, studded, swirly, veined, waffled, woven,
    wrinkled, zigzagged
    """
)

# Caltech-101 without faces-easy and background, in the wording of CoOp's split, 100 classes: 1.47 tokens a name.
CALTECH = _names(
    """
    accordion, airplane, anchor, ant, barrel, bass, beaver, binocular, bonsai, brain, brontosaurus, buddha,
    butterfly, camera, cannon, car side, ceiling fan, cellphone, chair, chandelier, cougar body, cougar face,
    crab, crayfish, crocodile, crocodile head, cup, dalmatian, dollar bill, dolphin, dragonfly, electric guitar,
    elephant, emu, euphonium, ewer, face, ferry, flamingo, flamingo head, garfield, gerenuk, gramophone, grand
    piano, hawksbill, headphone, hedgehog, helicopter, ibis, inline skate, joshua tree, kangaroo, ketch, lamp,
    laptop, leopard, llama, lobster, lotus, mandolin, mayfly, menorah, metronome, minaret, motorbike, nautilus,
    octopus, okapi, pagoda, panda, pigeon, pizza, platypus, pyramid, revolver, rhino, rooster, saxophone,
    schooner, scissors, scorpion, sea horse, snoopy, soccer ball, stapler, starfish, stegosaurus, stop sign,
    strawberry, sunflower, tick, trilobite, umbrella, watch, water lilly, wheelchair, wild cat, windsor chair,
    wrench, yin yang
    """
)
