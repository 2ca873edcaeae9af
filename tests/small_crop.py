# ruff: noqa: E501
"""A whole small crop file as text, so that tests can break one line of it and know its number."""

from __future__ import annotations

SMALL_CROP = """\
crop:
  id: wheat
  names: {hi: [गेहूं, गेहूँ], hinglish: [gehu], en: [wheat], misspelt: [गेंहू]}
  seasons: [rabi]
  sowing:
    - {where_hi: उत्तर के मैदान, from: 11-01, to: 11-25, sources: [a]}
  day_basis: sowing
  stages:
    - {id: seedling, name_hi: पौध, from_day: 0, to_day: 20}
    - {id: ripening, name_hi: पकना, from_day: 21, to_day: 130}
  sources: [a]
problems:
  - id: wheat_rust
    names: {hi: [पीला रतुआ], hinglish: [peela ratua], en: [yellow rust], misspelt: [पिला रतुआ], scientific: Puccinia}
    kind: fungal
    parts: [leaf]
    days: [40, 110]
    symptoms_hi:
      - पत्तों पर पीले रंग की धारियां हैं
      - पत्ती छूने से हाथ पीला हो जाता है
      - पत्तों पर हल्दी जैसा चूर्ण है
      - खेत के एक टुकड़े में पत्ते पीले हैं
      - पत्तियों पर पीली लकीरें बन गई हैं
    signs_hi: धारियों में पीला चूर्ण
    signs_en: rows of yellow powder
    favoured_by: {weather: cool_humid, weather_hi: ठंडा नम, weather_en: cool humid}
    soil_links: []
    look_alikes:
      - {id: wheat_nitrogen, check_hi: "रगड़ें, चूर्ण लगे तो रतुआ है", check_en: rub the leaf}
    cultural_hi:
      - रोज खेत देखें
      - यूरिया कम दें
    biological_hi: []
    chemical_hi: सिफारिश की हुई दवा कृषि विज्ञान केंद्र से पूछें
    chemicals:
      - {ai: propiconazole, name_hi: प्रोपिकोनाजोल, formulation: 25 EC, use: spray, dose: {amount: 200, unit: ml, per: acre}, waiting_days: 30, sources: [b]}
    prevention_hi:
      - अगली बार रोगरोधी किस्म बोएं
    urgency: high
    urgency_hi: यह तेजी से फैलता है
    kvk_hi: आधे खेत में फैले तो जाएं
    sources: {signs: [a], days: [a], weather: [a], measures: [b]}
    inferred: [checks]
  - id: wheat_nitrogen
    names: {hi: [नाइट्रोजन की कमी], hinglish: [nitrogen ki kami], en: [nitrogen deficiency], misspelt: [नाइट्रोजन कि कमी]}
    kind: nutrient
    parts: [leaf]
    days: [15, 70]
    symptoms_hi:
      - नीचे के पुराने पत्ते पीले पड़ रहे हैं
      - पूरी फसल फीकी है
      - पौधे छोटे रह गए हैं
      - नोक से पत्ते सूख रहे हैं
      - कल्ले कम निकले हैं
    signs_hi: पीलापन नीचे से शुरू
    signs_en: yellowing from below
    favoured_by: {weather: any, weather_hi: कोई भी, weather_en: any}
    soil_links: [low_n]
    look_alikes: []
    cultural_hi:
      - जांच के हिसाब से खाद दें
    biological_hi: []
    prevention_hi:
      - बुवाई की खाद न छोड़ें
    urgency: medium
    urgency_hi: इसी हफ्ते खाद दें
    kvk_hi: दस दिन में सुधार न हो तो जाएं
    sources: {signs: [a], soil: [b]}
    inferred: [days, measures]
sources:
  a: {title: One, publisher: A, year: 2020, url: "https://a.example/one", read: page}
  b: {title: Two, publisher: B, year: null, url: "https://b.example/two", read: excerpt}
"""


def line_of(text: str) -> int:
    """The number of the line that holds a text, which must stand once."""
    (number,) = [number for number, line in enumerate(SMALL_CROP.splitlines(), start=1) if text in line]
    return number
