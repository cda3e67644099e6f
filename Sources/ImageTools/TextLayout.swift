import Glibc

/// Text in the layout of C's printf, digit for digit, because callers parse it.
enum TextLayout {
    /// A size with three significant digits and a unit: `1.46 GiB`.
    static func size(_ bytes: UInt64) -> String {
        let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
        // Values of 1000 and more use the next unit, so a size never has four digits.
        var exponent: Int32 = 0
        _ = Glibc.frexp(Double(bytes) / (1000.0 / 1024.0), &exponent)
        let index = max(0, Int(exponent) - 1) / 10
        let value = Double(bytes) / Double(UInt64(1) << UInt64(index * 10))
        return format("%0.3g", value) + " " + units[index]
    }

    static func format(_ format: String, _ values: any CVarArg...) -> String {
        withVaList(values) { list in
            // Enough for any number; text of arbitrary length goes through `padded`.
            withUnsafeTemporaryAllocation(of: CChar.self, capacity: 128) { buffer in
                let length = Int(vsnprintf(buffer.baseAddress, buffer.count, format, list))
                return String(
                    decoding: buffer.prefix(min(max(0, length), buffer.count - 1))
                        .map { UInt8(bitPattern: $0) }, as: UTF8.self)
            }
        }
    }

    /// Text padded with spaces at its end; the width is in bytes, as in printf.
    static func padded(_ text: String, to width: Int) -> String {
        text + String(repeating: " ", count: max(0, width - text.utf8.count))
    }

    /// Text padded with spaces at its start.
    static func padded(_ width: Int, _ text: String) -> String {
        String(repeating: " ", count: max(0, width - text.utf8.count)) + text
    }

    /// A time in the local time zone: `2026-11-22 00:10:38`.
    static func localTime(_ seconds: UInt32) -> String {
        var time = time_t(seconds)
        var parts = tm()
        localtime_r(&time, &parts)
        return format(
            "%d-%02d-%02d %02d:%02d:%02d", Int32(parts.tm_year + 1900), Int32(parts.tm_mon + 1),
            Int32(parts.tm_mday), Int32(parts.tm_hour), Int32(parts.tm_min), Int32(parts.tm_sec))
    }
}
