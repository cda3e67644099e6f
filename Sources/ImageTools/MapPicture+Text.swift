import DiskImage

// The picture as text for a terminal.
extension MapPicture {
    /// - Parameters:
    ///   - isColored: use one terminal colour for each image of the chain. Without colours, a digit
    ///     marks data from backing files.
    ///   - isUnicode: use block elements instead of letters.
    public func text(isColored: Bool, isUnicode: Bool) -> String {
        let brush = Brush(isColored: isColored, isUnicode: isUnicode)
        var lines = [title.withoutControlCharacters]
        for start in stride(from: 0, to: cellCount, by: cellsPerRow) {
            let offset = range.lowerBound + Int64(start) * cellSize
            let looks = (start..<min(start + cellsPerRow, cellCount)).map { look($0) }
            lines.append(
                TextLayout.padded(Self.labelWidth, TextLayout.size(UInt64(offset))) + " "
                    + brush.row(looks))
        }
        lines.append("")
        for (part, text) in legend {
            lines.append(
                "  \(brush.row([Look(part: part)])) \(text.withoutControlCharacters)"
            )
        }
        lines.append(orderText)
        return lines.joined(separator: "\n") + "\n"
    }

    private struct Brush {
        let isColored: Bool
        let isUnicode: Bool

        /// Terminal colours by layer, as many as can be told apart.
        private static let colors = [32, 33, 36, 35, 34, 31, 92, 93, 96, 95]
        private static let gray = 90
        private static let blocks: [Character] = ["▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"]

        /// A row of cells; escape sequences only where the colour changes.
        func row(_ looks: [Look]) -> String {
            var result = ""
            var current: Int?
            for look in looks {
                if isColored, color(look.part) != current {
                    current = color(look.part)
                    result += "\u{1b}[\(color(look.part))m"
                }
                result.append(glyph(look))
            }
            return current == nil ? result : result + "\u{1b}[0m"
        }

        private func color(_ part: Part) -> Int {
            part.kind.hasLayer ? Self.colors[part.layer % Self.colors.count] : Self.gray
        }

        private func glyph(_ look: Look) -> Character {
            if look.part.layer > 0, !isColored { return Character("\(look.part.layer)") }
            switch look.part.kind {
            case .data:
                return isUnicode ? Self.blocks[look.level - 1] : look.level < 4 ? "d" : "D"
            case .compressed:
                return isUnicode ? (look.level < 4 ? "░" : "▓") : look.level < 4 ? "c" : "C"
            case .preallocated: return isUnicode ? "□" : "p"
            case .zero: return isUnicode ? "○" : "z"
            case .hole: return isUnicode ? "·" : "."
            }
        }
    }
}
