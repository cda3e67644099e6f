import Foundation
import TestSupport
import Testing

/// Expects a refusal: exit 1, no standard output, and one error line without control characters.
func expectRefusal(
    _ outcome: Outcome, status: Int32 = 1, says: String = "",
    at location: SourceLocation = #_sourceLocation
) {
    #expect(outcome.status == status, "\(outcome)", sourceLocation: location)
    #expect(outcome.output.isEmpty, "\(outcome)", sourceLocation: location)
    expectOneErrorLine(outcome, says: says, at: location)
}

func expectOneErrorLine(
    _ outcome: Outcome, says: String = "", at location: SourceLocation = #_sourceLocation
) {
    let text = outcome.errorText
    #expect(text.hasPrefix(Swimg.prefix), "\(outcome)", sourceLocation: location)
    #expect(
        text.hasSuffix("\n") && text.filter { $0.isNewline }.count == 1,
        "not one line: \(outcome)", sourceLocation: location)
    let controls = text.unicodeScalars.dropLast().filter {
        $0.properties.generalCategory == .control
    }
    #expect(controls.isEmpty, "control characters: \(outcome)", sourceLocation: location)
    #expect(
        says.isEmpty || text.lowercased().contains(says.lowercased()),
        "expected \(says.debugDescription) in: \(outcome)", sourceLocation: location)
}

func expectSuccess(_ outcome: Outcome, at location: SourceLocation = #_sourceLocation) {
    #expect(outcome.status == 0, "\(outcome)", sourceLocation: location)
    #expect(
        outcome.output.isEmpty && outcome.errors.isEmpty, "not silent: \(outcome)",
        sourceLocation: location)
}
