import Testing

@testable import DiskImage

@Suite struct JSONValueTests {
    @Test func isLaidOutAsQemuDoes() {
        let value = JSONValue.object([
            .init("name", .string("a\"b\\\u{7}\n\u{e9}\u{1f600}")), .init("size", .integer(-1)),
            .init("children", .array([.object([.init("ok", .bool(true))]), .bool(false)])),
        ])
        #expect(
            value.text == #"""
                {
                    "name": "a\"b\\\u0007\n\u00E9\uD83D\uDE00",
                    "size": -1,
                    "children": [
                        {
                            "ok": true
                        },
                        false
                    ]
                }
                """#)
    }
}
