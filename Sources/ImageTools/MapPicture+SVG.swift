import DiskImage

// The picture as an SVG file (https://www.w3.org/TR/SVG11/) for browsers.
extension MapPicture {
    /// Side of a cell in pixels, as are the other lengths.
    private static let cell = 8
    private static let rowHeight = 14
    private static let lineHeight = 18
    private static let margin = 90

    public var svg: String {
        let rows = cellCount.dividedUp(by: cellsPerRow)
        let top = 2 * Self.lineHeight
        let legendTop = top + rows * Self.rowHeight + 2 * Self.lineHeight
        let legend = legend
        let width = Self.margin + cellsPerRow * Self.cell + 20
        let height = legendTop + (legend.count + 1) * Self.lineHeight
        var lines = [
            """
            <svg xmlns="http://www.w3.org/2000/svg" width="\(width)" height="\(height)" \
            viewBox="0 0 \(width) \(height)" font-family="monospace" font-size="12">
            """,
            #"<rect width="100%" height="100%" fill="white"/>"#,
            text(title, x: 10, y: Self.lineHeight),
        ]
        for row in 0..<rows {
            let offset = range.lowerBound + Int64(row * cellsPerRow) * cellSize
            let y = top + row * Self.rowHeight
            lines.append(
                text(
                    TextLayout.padded(Self.labelWidth, TextLayout.size(UInt64(offset))), x: 10,
                    y: y + Self.rowHeight - 4))
            lines += cells(row, y: y)
        }
        for (number, entry) in legend.enumerated() {
            let y = legendTop + number * Self.lineHeight
            let look = Look(part: entry.part)
            lines.append(rectangle(look, x: 10, y: y - 10, cells: 1))
            lines.append(text(entry.text, x: 28, y: y))
        }
        lines.append(text(orderText, x: 10, y: legendTop + legend.count * Self.lineHeight))
        return (lines + ["</svg>"]).joined(separator: "\n") + "\n"
    }

    /// Draws neighbouring cells with the same look as one rectangle.
    private func cells(_ row: Int, y: Int) -> [String] {
        let first = row * cellsPerRow
        let end = min(first + cellsPerRow, cellCount)
        var lines: [String] = []
        var start = first
        while start < end {
            let look = look(start)
            var next = start + 1
            while next < end, self.look(next) == look { next += 1 }
            let x = Self.margin + (start - first) * Self.cell
            lines.append(rectangle(look, x: x, y: y, cells: next - start))
            start = next
        }
        return lines
    }

    private func rectangle(_ look: Look, x: Int, y: Int, cells: Int) -> String {
        let opacity = look.level < 8 ? " fill-opacity=\"0.\(look.level + 1)\"" : ""
        return """
            <rect x="\(x)" y="\(y)" width="\(cells * Self.cell)" height="\(Self.rowHeight - 2)" \
            fill="\(color(look.part))"\(opacity)/>
            """
    }

    /// A hue for each layer, darker for compressed data. The palette by Okabe and Ito is also
    /// distinguishable with red-green colour blindness.
    private func color(_ part: Part) -> String {
        let plain = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9"]
        let dark = ["#003f63", "#8f6300", "#005c43", "#85416a", "#2b7ba8"]
        switch part.kind {
        case .data: return plain[part.layer % plain.count]
        case .compressed: return dark[part.layer % dark.count]
        case .preallocated: return "#c8d8e4"
        case .zero: return "#d9d9d9"
        case .hole: return "#f4f4f4"
        }
    }

    private func text(_ text: String, x: Int, y: Int) -> String {
        #"<text x="\#(x)" y="\#(y)" xml:space="preserve">\#(Self.escaped(text))</text>"#
    }

    private static func escaped(_ text: String) -> String {
        text.withoutControlCharacters.replacing("&", with: "&amp;").replacing("<", with: "&lt;")
            .replacing(">", with: "&gt;")
    }
}
