import DiskImage
import ImageConvert

/// The lines about what a conversion could not read (`--salvage`).
enum SalvageReport {
    static func printError(_ lost: [LostRange]) {
        for range in lost {
            guard ProgramName.isQemuImg else {
                Output.printError("swimg: warning: \(line(range))\n")
                continue
            }
            // qemu-img has a line for each sector.
            for offset in stride(
                from: range.range.lowerBound, to: range.range.upperBound,
                by: Int(guestSectorSize))
            {
                Output.printError(
                    "qemu-img: warning: error while reading offset \(offset): "
                        + "\(range.reason.withoutControlCharacters)\n")
            }
        }
    }

    private static func line(_ lost: LostRange) -> String {
        let words =
            "\(lost.range.count) bytes from guest offset \(lost.range.lowerBound) on cannot be "
            + "read, and become zeros: \(lost.reason)"
        return (lost.path.map { "\($0): \(words)" } ?? words).withoutControlCharacters
    }
}
