import DiskImage

/// Reads a number that qemu-img takes without an option letter; errors use qemu-img's words.
///
/// - Parameter name: the number's name in messages.
func sizeArgument(
    _ text: String, name: String, in range: ClosedRange<Int64> = 0...Int64.max
) throws(ImageError) -> Int64 {
    switch ByteSizeText(text) {
    case .bytes(let number) where range.contains(number): return number
    case .bytes, .outOfRange:
        throw .invalid(
            "Invalid \(name) specified. Must be between \(range.lowerBound) and "
                + "\(range.upperBound).")
    case .malformed:
        let words = "Invalid \(name) specified. You may use k, M, G, T, P or E suffixes for"
        let units = "kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes."
        throw ImageError.invalid("\(words) \(units)").asQemu(words, hint: "qemu-img: \(units)")
    }
}
