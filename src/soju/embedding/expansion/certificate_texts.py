"""Short texts of our own on which every expansion is checked, whatever else is given."""

from __future__ import annotations

CHECKED_TEXTS: dict[str, tuple[str, ...]] = {
    "en": (
        "The committee will meet on Thursday to discuss next year's budget.",
        "It's raining; she'll take the 7:45 train, won't she?",
        "A sparse index maps every term to the documents that contain it.",
        "Order #48213 was shipped to 12 Baker Street -- tracking: ZX-99/b.",
        "naïve café résumé façade, £3.50, 20 °C, 100 %",
        "Line one.\n\n\tIndented line two.   \nLine three…",
    ),
    "code": (
        "def add(a: int, b: int = 0) -> int:\n    return a + b  # sum\n",
        'for (let i = 0; i < items.length; ++i) { console.log(`${i}: "${items[i]}"`); }',
        "SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name ORDER BY 2 DESC;",
        '{"id": 17, "tags": ["a", "b"], "nested": {"ok": true, "none": null}}\r\n',
        '#include <stdio.h>\nint main(void) {\n\tprintf("%d\\n", 0x2A << 3);\n\treturn 0;\n}',
    ),
    "ja": (
        "東京都の天気は、あしたも晴れるでしょう。",
        "コンピューターで日本語の文章を検索する。",
        "これはテストです!「引用」と（括弧）を含みます。",
    ),
    "zh": (
        "今天下午三点在图书馆开会，请准时参加。",
        "他們正在討論機器學習與資料檢索的問題。",
        "价格：￥128.00（含税），数量不限！",
    ),
    "ko": (
        "오늘 오후 세 시에 도서관에서 회의가 있으니 시간을 지켜 주세요.",
        "데이터베이스에서 문서를 빠르게 검색하는 방법을 알아봅시다.",
        "아니ㅋㅋㅋ 그게 뭐야ㅠㅠ 진짜 웃기다!!",
        "서울특별시 강남구 테헤란로 152, 2026년 3월 1일(일) 14:30",
        'API를 호출하면 JSON으로 응답합니다(예: `{"상태": "정상"}`).',
        "“그렇군요,” 그가 말했다. — 못 믿겠다는 듯이…",
        "뷁 쀍 꽒 힣 가각갂",
    ),
    "mixed": (
        "한국어와 English와 日本語、中文이 섞인 문장 😀👍🏽",
        "\u1112\u1161\u11ab\u1100\u116e\u11a8\u110b\u1165 (NFD)",
        "ㄱㄴㄷ ㅏㅑㅓ ꥠힰ",
        "  앞뒤 공백과\t탭 \n\n 줄바꿈  ",
        "<|endoftext|> 뒤에 오는 말과 <|im_start|>user\n안녕<|im_end|>",
        "",
        "가",
    ),
}
"""By language; ``en``, ``code``, ``ja`` and ``zh`` must keep their ids, the others must be coarsenings."""

UNCHANGED = ("en", "code", "ja", "zh")
